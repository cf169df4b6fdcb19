"""Settings and shared fixtures: one thread, no hub, each tiny pipeline built once in a session."""

import os
import sys
from pathlib import Path


for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]  # `pytest` alone adds neither

import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs only with `-m slow`")


NEWER = (  # families, by their names in tests
    *("flux2", "chroma", "lumina", "aura", "qwen", "ernie", "krea", "kolors", "hunyuan"),
    *("hidream", "wan_", "wan22_", "wan-"),
)


PROOFS = (  # that training sees what the pipeline sees, and that the pipeline integrates what was trained
    *("the_denoiser_is_called_as_the_pipeline", "what_is_trained_can_be_sampled", "no_caption_is_what_guidance"),
    *("timesteps_and_captions_matter", "weights_are_idle", "a_number_that_does_not_fit", "original_name"),
)


def is_repeated(item):
    """Whether a test is one of a newer family, and not one of those that prove a family."""
    path, _, parameters = item.nodeid.partition("[")
    proof = path.startswith("tests/families/") and any(name in path for name in PROOFS)
    return not proof and any(name in parameters for name in NEWER)


def pytest_collection_modifyitems(config, items):
    for item in filter(is_repeated, items):
        item.add_marker(pytest.mark.slow)
    if "slow" in (config.getoption("-m") or ""):
        return
    skip = pytest.mark.skip(reason="slow: run with `-m slow`")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def sd_pipeline(tmp_path_factory):
    """Folder of a tiny Stable Diffusion that predicts epsilon."""
    from tiny import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def sd_v_pipeline(tmp_path_factory):
    """Folder of a tiny Stable Diffusion that predicts v."""
    from tiny import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("sd_v"), prediction_type="v_prediction")


@pytest.fixture(scope="session")
def sd3_pipeline(tmp_path_factory):
    """Folder of a tiny Stable Diffusion 3 with its T5."""
    from tiny import tiny_sd3

    return tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def sd3_without_t5(tmp_path_factory):
    """Folder of a tiny Stable Diffusion 3 whose third text encoder is None."""
    from tiny import tiny_sd3

    return tiny_sd3(tmp_path_factory.mktemp("sd3_without_t5"), t5=False)


@pytest.fixture(scope="session")
def sdxl_pipeline(tmp_path_factory):
    """Folder of a tiny Stable Diffusion XL."""
    from tiny import tiny_sdxl

    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def sdxl_v_pipeline(tmp_path_factory):
    """Folder of a tiny Stable Diffusion XL that predicts v."""
    from tiny import tiny_sdxl

    return tiny_sdxl(tmp_path_factory.mktemp("sdxl_v"), prediction_type="v_prediction")


@pytest.fixture(scope="session")
def pixart_alpha_pipeline(tmp_path_factory):
    """Folder of a tiny PixArt alpha that is told the image's size."""
    from tiny import tiny_pixart

    return tiny_pixart(tmp_path_factory.mktemp("pixart_alpha"), "alpha")


@pytest.fixture(scope="session")
def pixart_sigma_pipeline(tmp_path_factory):
    """Folder of a tiny PixArt Sigma."""
    from tiny import tiny_pixart

    return tiny_pixart(tmp_path_factory.mktemp("pixart_sigma"), "sigma")


@pytest.fixture(scope="session")
def dit_pipeline(tmp_path_factory):
    """Folder of a tiny class-conditional DiT."""
    from tiny import tiny_dit

    return tiny_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="session")
def flux_pipeline(tmp_path_factory):
    """Folder of a tiny Flux that is told the guidance."""
    from tiny import tiny_flux

    return tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def z_image_pipeline(tmp_path_factory):
    """Folder of a tiny Z-Image."""
    from tiny import tiny_z_image

    return tiny_z_image(tmp_path_factory.mktemp("z_image"))


@pytest.fixture(scope="session")
def qwen_image_pipeline(tmp_path_factory):
    """Folder of a tiny Qwen-Image."""
    from tiny import tiny_qwen_image

    return tiny_qwen_image(tmp_path_factory.mktemp("qwen_image"))


@pytest.fixture(scope="session")
def ernie_image_pipeline(tmp_path_factory):
    """Folder of a tiny ERNIE-Image."""
    from tiny import tiny_ernie_image

    return tiny_ernie_image(tmp_path_factory.mktemp("ernie_image"))


@pytest.fixture(scope="session")
def kolors_pipeline(tmp_path_factory):
    """Folder of a tiny Kolors."""
    pytest.importorskip("sentencepiece", reason="Kolors' tokenizer needs sentencepiece")
    from tiny import tiny_kolors

    return tiny_kolors(tmp_path_factory.mktemp("kolors"))


@pytest.fixture(scope="session")
def hunyuan_image_pipeline(tmp_path_factory):
    """Folder of a tiny HunyuanImage."""
    from tiny import tiny_hunyuan_image

    return tiny_hunyuan_image(tmp_path_factory.mktemp("hunyuan_image"))


@pytest.fixture(scope="session")
def krea2_pipeline(tmp_path_factory):
    """Folder of a tiny Krea 2."""
    from tiny import tiny_krea2

    return tiny_krea2(tmp_path_factory.mktemp("krea2"))


@pytest.fixture(scope="session")
def flux2_klein_pipeline(tmp_path_factory):
    """Folder of a tiny FLUX.2 [klein]."""
    from tiny import tiny_flux2

    return tiny_flux2(tmp_path_factory.mktemp("flux2_klein"))


@pytest.fixture(scope="session")
def flux2_pipeline(tmp_path_factory):
    """Folder of a tiny FLUX.2 [dev]."""
    from tiny import tiny_flux2

    return tiny_flux2(tmp_path_factory.mktemp("flux2"), kind="dev")


@pytest.fixture(scope="session")
def chroma_pipeline(tmp_path_factory):
    """Folder of a tiny Chroma."""
    from tiny import tiny_chroma

    return tiny_chroma(tmp_path_factory.mktemp("chroma"))


@pytest.fixture(scope="session")
def lumina2_pipeline(tmp_path_factory):
    """Folder of a tiny Lumina-Image 2."""
    from tiny import tiny_lumina2

    return tiny_lumina2(tmp_path_factory.mktemp("lumina2"))


@pytest.fixture(scope="session")
def aura_flow_pipeline(tmp_path_factory):
    """Folder of a tiny AuraFlow."""
    from tiny import tiny_aura_flow

    return tiny_aura_flow(tmp_path_factory.mktemp("aura_flow"))


@pytest.fixture(scope="session")
def hidream_pipeline(tmp_path_factory):
    """Folder of a tiny HiDream-I1."""
    from tiny import tiny_hidream

    return tiny_hidream(tmp_path_factory.mktemp("hidream"))


@pytest.fixture(scope="session")
def wan_pipeline(tmp_path_factory):
    """Folder of a tiny Wan."""
    from tiny import tiny_wan

    return tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def wan22_pipeline(tmp_path_factory):
    """Folder of a tiny Wan whose VAE has patches."""
    from tiny import tiny_wan

    return tiny_wan(tmp_path_factory.mktemp("wan22"), "wan22")


@pytest.fixture(scope="session")
def sana_pipeline(tmp_path_factory):
    """Folder of a tiny Sana."""
    from tiny import tiny_sana

    return tiny_sana(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Folder of eight real pictures with captions, of various sizes and modes."""
    from tiny import tiny_image_folder

    return tiny_image_folder(tmp_path_factory.mktemp("images"), count=8)


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory):
    """Folder of nine real pictures in three classes, a sub-folder each."""
    from tiny import tiny_class_folder

    return tiny_class_folder(tmp_path_factory.mktemp("classes"))


@pytest.fixture
def no_weights(monkeypatch):
    """Nothing may load weights or a data set."""
    import transformers
    from diffusers import DiffusionPipeline, ModelMixin

    def loaded(*args, **kwargs):
        raise AssertionError("weights or data were loaded before the command was refused")

    for loader in (DiffusionPipeline, ModelMixin, transformers.PreTrainedModel):
        monkeypatch.setattr(loader, "from_pretrained", loaded)
    monkeypatch.setattr("lpl.data.source.load_dataset", loaded)


@pytest.fixture
def gpu(monkeypatch):
    """The preflight finds a GPU."""
    monkeypatch.setattr("lpl.training.preflight.has_gpu", lambda: True)
