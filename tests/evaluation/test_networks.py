import json
import os
from importlib.metadata import version

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from tiny import _clip_config, _clip_tokenizer, seeded
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    ConvNextImageProcessorPil,
    Data2VecVisionConfig,
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    PoolFormerImageProcessorPil,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTMAEConfig,
    ViTModel,
)

from lpl.evaluation import (
    FeatureNetwork,
    Preprocessing,
    TextImageNetwork,
    listed_images,
    load_network,
)
from lpl.evaluation.networks import (
    TransformersNetwork,
    check_network,
    check_networks,
    load_networks,
    try_out,
    wanted_networks,
)


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Means(nn.Module):
    """Means of the colours, and how often it was called."""

    fingerprint = "means of the colours"

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.calls = 0

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3 and not self.training
        self.calls += len(pixels)
        return self.scale * pixels.double().mean((2, 3))


class Unnamed(Means):
    """Says nothing of what it computes."""

    fingerprint = None


class Flat(nn.Module):
    """No features at all."""

    def forward(self, pixels):
        return pixels.float().mean((1, 2, 3))


def means():
    return Means(2.0)


def flat():
    return Flat()


def number():
    return 3


def save(folder, build, tokenizer=None):
    """A tiny model, its processor, and its tokenizer if any."""
    with seeded(0):
        build().save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    config = Dinov2Config(image_size=28, patch_size=14, **SIZES)
    return save(tmp_path_factory.mktemp("dinov2"), lambda: Dinov2Model(config))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = _clip_tokenizer()
    vision = CLIPVisionConfig(image_size=32, patch_size=16, **SIZES)
    text = _clip_config(tokenizer, 16, 12)
    with seeded(0):
        CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures():
    """Seven crops of a photograph."""
    image = Image.fromarray(skimage.data.astronaut())
    return [image.crop((40 * index, 100, 40 * index + 64, 164)) for index in range(7)]


@pytest.fixture
def images(pictures):
    return listed_images(pictures, "crops", Preprocessing(48))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where features are kept by default."""
    monkeypatch.setenv("LPL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Networks of transformers


def test_dinov2_gives_its_pooled_class_token(dinov2, pictures):
    network = load_network(dinov2)
    assert isinstance(network, FeatureNetwork) and not isinstance(network, TextImageNetwork)
    assert network.name == dinov2
    found = network.features(pictures)
    assert (found.shape, found.dtype, found.device.type) == ((7, 16), torch.float32, "cpu")
    mean, deviation = (torch.tensor(network.preprocessing[f"image_{kind}"]).view(3, 1, 1) for kind in ("mean", "std"))
    model = Dinov2Model.from_pretrained(dinov2).eval()
    for row, picture in zip(found, pictures):
        resized = picture.resize((28, 28), Image.Resampling.BICUBIC)
        pixels = (torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 - mean) / deviation
        with torch.no_grad():
            tokens = model(pixels[None].float()).last_hidden_state
        torch.testing.assert_close(row, tokens[0, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network.features(pictures[3:4])[0], found[3])


CROP = {"height": 28, "width": 28}


@pytest.mark.parametrize(
    "kind, settings",
    [
        (BitImageProcessorPil, {"size": {"shortest_edge": 32}, "crop_size": CROP}),
        (BitImageProcessorPil, {"do_resize": False, "crop_size": CROP}),
        (ConvNextImageProcessorPil, {"size": {"shortest_edge": 28}, "crop_pct": 0.875}),
        (PoolFormerImageProcessorPil, {"size": {"shortest_edge": 28}, "crop_size": CROP, "crop_pct": 0.9}),
        (CLIPImageProcessorPil, {"size": CROP, "do_center_crop": False}),  # nothing to be changed
    ],
)
def test_networks_see_all_of_the_image(kind, settings, pictures):
    """Whatever their processors would cut off."""
    network = TransformersNetwork("any", nn.Identity(), kind(**settings), "cpu")
    processor = network.processor
    mean, deviation = (torch.tensor(moment).view(3, 1, 1) for moment in (processor.image_mean, processor.image_std))
    resized = [np.array(picture.resize((28, 28), processor.resample)) for picture in pictures]
    expected = (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255 - mean) / deviation
    torch.testing.assert_close(network._pixels(pictures), expected, atol=1e-5, rtol=1e-5)
    assert network.preprocessing == processor.to_dict() | {"pooled": True}  # as it is now


def test_preprocessing_is_recorded(dinov2):
    recorded = json.loads(json.dumps(load_network(dinov2).preprocessing))
    assert recorded["size"] == {"height": 28, "width": 28} and not recorded["do_center_crop"]
    assert recorded["resample"] == 3 and recorded["pooled"]


def test_fingerprints_go_by_all_that_decides_the_features(dinov2, tmp_path, monkeypatch):
    def changed(change):
        network = load_network(dinov2)
        with torch.no_grad():
            change(network)
        return network.fingerprint

    expected = load_network(dinov2).fingerprint
    assert load_network(dinov2).fingerprint == expected and len(expected) == 64
    found = {
        expected,
        changed(lambda network: network.module.layernorm.bias.add_(1)),
        changed(lambda network: network.preprocessing.update(resample=2)),
        changed(lambda network: setattr(network.module.config, "layer_norm_eps", 1e-3)),
        changed(lambda network: setattr(network, "name", "another")),
    }
    versions = {library: version(library) for library in ("torch", "transformers", "pillow")}
    for library in versions:
        with monkeypatch.context() as patch:
            patch.setattr("importlib.metadata.version", {**versions, library: "another"}.get)
            found.add(load_network(dinov2).fingerprint)
    assert len(found) == 8


def test_autocast_does_not_matter(dinov2, pictures):
    network = load_network(dinov2)
    expected = network.features(pictures)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network.features(pictures), expected)
    assert not expected.requires_grad


def test_clip_gives_images_and_captions_in_one_space(clip, pictures):
    network = load_network(clip)
    assert isinstance(network, TextImageNetwork)
    found = network.features(pictures)
    assert found.shape == (7, 12)
    model = CLIPModel.from_pretrained(clip).eval()
    captions = ["a cat", "the dog", "a cat " * 200]
    tokens = _clip_tokenizer()(captions[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=network._pixels(pictures))
    for mine, theirs in ((found, output.image_embeds), (network.text_features(captions)[:2], output.text_embeds)):
        torch.testing.assert_close(mine / mine.norm(dim=1, keepdim=True), theirs, atol=1e-4, rtol=1e-4)
    texts = network.text_features(captions)
    assert texts.shape == (3, 12) and texts.isfinite().all()
    torch.testing.assert_close(network.text_features(captions, batch_size=2), texts)


def test_siglip_reads_captions_at_full_length(tmp_path, pictures):
    """Its pooled token is the last one, so that padding to the longest of a batch would change the features."""
    tokenizer = _clip_tokenizer()
    length = tokenizer.model_max_length
    text = {**SIZES, "vocab_size": len(tokenizer.get_vocab()), "max_position_embeddings": length}
    config = SiglipConfig(text_config=text, vision_config={**SIZES, "image_size": 28, "patch_size": 14})
    folder = save(tmp_path, lambda: SiglipModel(config), tokenizer=tokenizer)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids"]  # as SigLIP's own: no mask
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    network = load_network(folder)
    tokens = tokenizer(["a cat"], padding="max_length", max_length=length, return_tensors="pt")
    model = SiglipModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        output = model(input_ids=tokens["input_ids"], pixel_values=network._pixels(pictures))
    captions = network.text_features(["a cat", "the dog the dog"])
    for mine, theirs in ((captions[:1], output.text_embeds), (network.features(pictures), output.image_embeds)):
        torch.testing.assert_close(mine / mine.norm(dim=1, keepdim=True), theirs, atol=1e-4, rtol=1e-4)


def test_a_pooler_without_weights_is_not_used(tmp_path, pictures):
    """Else its weights would be random, and other ones each time."""
    config = ViTConfig(image_size=28, patch_size=14, **SIZES)
    folder = save(tmp_path, lambda: ViTModel(config, add_pooling_layer=False))
    networks = [load_network(folder) for _ in range(2)]
    found = [network.features(pictures) for network in networks]
    assert torch.equal(*found) and networks[0].fingerprint == networks[1].fingerprint
    model = ViTModel.from_pretrained(folder).eval()
    with torch.no_grad():
        tokens = model(networks[0]._pixels(pictures)).last_hidden_state
    assert not networks[0].preprocessing["pooled"]
    torch.testing.assert_close(found[0], tokens[:, 0], atol=1e-4, rtol=1e-4)


def test_convolutional_networks_are_pooled_to_rows(tmp_path, pictures):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    network = load_network(save(tmp_path, lambda: ResNetModel(config)))
    assert network.features(pictures).shape == (7, 12)


def test_weights_that_lack_something_are_refused(dinov2, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path, lambda: Dinov2Model.from_pretrained(dinov2))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="layernorm.weight.*random"):
        load_network(folder)


@pytest.mark.parametrize(
    "name, said",
    [("nowhere/at-all", "it is not in the cache, and the Hub cannot be"), ("./no-folder", "there is no such network")],
)
def test_unknown_names_are_refused(name, said):
    with pytest.raises(ValueError, match=f"^--features {name}: {said}"):
        load_network(name)


def test_language_models_are_refused(tmp_path):
    BertModel(BertConfig(vocab_size=20, **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert is no image model"):
        load_network(str(tmp_path))


@pytest.mark.parametrize("config", [Data2VecVisionConfig, IJepaConfig, ViTMAEConfig])
def test_models_without_a_pooled_output_are_refused(config, tmp_path):
    config(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"a {config.model_type} has no features of the image as a whole"):
        check_network(str(tmp_path))


def test_what_knows_no_captions_is_no_clip(dinov2, clip):
    check_network(clip, text=True)
    check_network(dinov2)
    for name in (dinov2, "inception", f"{__name__}:means"):
        with pytest.raises(ValueError, match="--clip .*(captions|CLIP)"):
            check_network(name, flag="--clip", text=True)


def test_inception_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torch-fidelity torchvision"):
        load_network("inception")


@pytest.fixture
def inception(monkeypatch):
    """In the place of torchmetrics' class, which downloads: records its options, and the environment that it sees."""
    seen = []

    class Metric:
        def __init__(self, **options):
            seen.append((options, {name: word for name, word in os.environ.items() if "WEIGHTS_ONLY" in name}))
            self.inception = Unnamed()

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", Metric)
    monkeypatch.setattr("lpl.evaluation.networks.INCEPTION_NEEDS", {})
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 1")
    return seen


def test_inception_is_that_of_published_numbers(inception, pictures, monkeypatch):
    network = load_network("inception")
    assert (network.name, network.features(pictures).shape) == ("inception", (7, 3))
    assert network.preprocessing == {"resize": 299, "antialias": False}
    assert inception[0][0] == {"feature": 2048, "antialias": False}
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} {2 if name == 'torch-fidelity' else 1}")
    assert load_network("inception").fingerprint != network.fingerprint is not None


@pytest.mark.parametrize("before", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_inception_leaves_the_environment_as_it_was(inception, before, monkeypatch):
    """Torch takes only one of these two variables at a time."""
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, word in before.items():
        monkeypatch.setenv(name, word)
    load_network("inception")
    assert inception[0][1] == {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}
    assert {name: word for name, word in os.environ.items() if "WEIGHTS_ONLY" in name} == before


def test_an_inception_that_cannot_be_downloaded_is_refused(inception, monkeypatch):
    def offline(**options):
        raise OSError("no connection")

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", offline)
    with pytest.raises(ValueError, match="^--eval_features inception: it cannot be downloaded: no connection"):
        load_network("inception", flag="--eval_features")


# All that are needed


def test_metrics_need_the_networks_that_they_use():
    features, flag = ["one", "two"], "--eval_features"
    assert wanted_networks(["fid", "clip_score"], features, "clip", "--eval_") == {
        "one": (flag, False),
        "two": (flag, False),
        "clip": ("--eval_clip", True),
    }
    assert wanted_networks(["recall"], features, "clip") == dict.fromkeys(features, ("--features", False))
    assert wanted_networks(["clip_score"], features, "clip") == {"clip": ("--clip", True)}
    both = wanted_networks(["kid", "clip_score"], ["clip", "one"], "clip")  # which has to know captions then
    assert both == {"clip": ("--clip", True), "one": ("--features", False)}


def test_all_networks_are_checked_under_their_flags(dinov2, clip):
    check_networks({dinov2: ("--features", False), clip: ("--clip", True)})
    with pytest.raises(ValueError, match="^--clip .*dinov2 does not understand captions"):
        check_networks({clip: ("--features", False), dinov2: ("--clip", True)})
    with pytest.raises(ValueError, match="^--features nowhere/at-all: "):
        check_networks({dinov2: ("--features", False), "nowhere/at-all": ("--features", False)})


def test_all_networks_are_loaded_and_tried_out(dinov2, clip, pictures):
    wanted = {dinov2: ("--features", False), f"{__name__}:means": ("--features", False), clip: ("--clip", True)}
    networks = load_networks(wanted, pictures[0], "cpu", None)
    assert list(networks) == list(wanted) == [network.name for network in networks.values()]
    assert isinstance(networks[clip], TextImageNetwork) and networks[f"{__name__}:means"].module.calls == 1
    for name, message in ((f"{__name__}:flat", "it fails on an image of 64 x 64 pixels"), ("no:thing", "no")):
        with pytest.raises(ValueError, match=f"^--eval_features {name}: .*{message}"):
            load_networks(wanted | {name: ("--eval_features", False)}, pictures[0], "cpu", None)


@pytest.mark.parametrize("name", ["nowhere/at-all", "no_such:package", "inception", f"{__name__}:number"])
def test_refusals_name_the_flag(name, monkeypatch):
    monkeypatch.setattr("lpl.evaluation.networks.INCEPTION_NEEDS", {"no_such_package": "no-such-package"})
    with pytest.raises(ValueError, match=f"^--eval_features {name}: "):
        load_network(name, flag="--eval_features")
    with pytest.raises(ValueError, match=f"^--features {name}: "):
        load_network(name)


# One's own


def test_a_function_of_ones_own_is_called(pictures):
    network = load_network(f"{__name__}:means")
    assert isinstance(network, FeatureNetwork) and network.name == f"{__name__}:means"
    expected = [2 * np.asarray(picture).mean((0, 1)) for picture in pictures]
    np.testing.assert_allclose(network.features(pictures), expected, rtol=1e-5)


def test_a_module_may_be_given(pictures):
    network = load_network(Means().train())
    assert network.name == "Means" and network.features(pictures[:2]).shape == (2, 3)


def test_what_a_module_computes_is_known_by_its_own_word():
    """Its weights, shapes and layers do not tell: these two convolutions have the same."""
    strides = [nn.Sequential(nn.Conv2d(3, 4, 3, stride=stride), nn.Flatten()) for stride in (1, 2)]
    strides[1].load_state_dict(strides[0].state_dict())
    assert [load_network(module).fingerprint for module in strides] == [None, None]
    for stride, module in enumerate(strides):
        module.fingerprint = f"stride {stride}"
    modules = [*strides, Means(), Means(2.0)]
    assert len({load_network(module).fingerprint for module in modules} - {None}) == 4
    network = load_network(Means())
    assert network.fingerprint == network.fingerprint == load_network(Means()).fingerprint


def test_a_module_may_keep_other_things_than_tensors():
    class Counting(Means):
        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    module = Counting()
    assert any(not isinstance(kept, torch.Tensor) for kept in module.state_dict().values())
    assert len(load_network(module).fingerprint) == 64


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_package:means", "cannot be imported.*no_such_package"),
        (f"{__name__}:nothing", "cannot be imported.*nothing"),
        (":means", "package.module:function"),
        (f"{__name__}:number", "returns int"),
    ],
)
def test_functions_that_give_no_module_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        load_network(name)


def test_features_of_another_shape_are_refused(pictures):
    with pytest.raises(ValueError, match=r"^Flat: for 7 images it returns \(7,\) instead of \(B, D\)"):
        load_network(Flat()).features(pictures)


def test_a_network_that_fails_on_such_images_is_refused():
    image = Image.fromarray(skimage.data.astronaut()).resize((24, 24))
    wrong = load_network(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    for flag in ("--features", "--eval_features"):
        with pytest.raises(ValueError, match=f"^{flag} Sequential: it fails on an image of 24 x 24 pixels"):
            try_out(wrong, image, flag)
    try_out(load_network(Means()), image)
