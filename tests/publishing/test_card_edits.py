"""A card that exists: results that are added, and the address where it is published."""

import shlex

import pytest
from huggingface_hub import ModelCard, metadata_load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lpl.publishing.card import write_model_card
from lpl.publishing.card_edits import add_results, address_card
from lpl.tools.privacy import without_secrets
from tests.publishing.test_card import RESULT, card, code, put_samples


# Results


def test_results_stand_before_the_command_and_replace_their_like(tmp_path):
    readme = write_model_card(tmp_path, card())
    before = ModelCard.load(readme).text
    for text in ("### Foxes\n\n9", "### Hens\n\n8", "### Foxes\n\n7"):
        add_results(readme, [RESULT], text)
    after = ModelCard.load(readme)
    results = "## Results\n\n### Hens\n\n8\n\n### Foxes\n\n7\n\n"
    assert after.text.replace(results, "") == before and f"{results}## Train it again" in after.text
    assert after.data.eval_results == [RESULT]


def test_a_finished_card_gets_its_address(tmp_path):
    folder = put_samples(tmp_path / "my run", "step-001000", ['load "path/to/my run"'])
    recipe = {"train_data_dir": str(tmp_path / "elsewhere" / "my run")}  # of the same name
    facts = {"repo_id": None, "recipe": recipe, "results": [RESULT], "results_text": "### Foxes\n\n9.5"}
    command = ["train.py", "--output_dir", str(folder), "--train_data_dir", recipe["train_data_dir"]]
    readme = write_model_card(folder, card(**facts, prompt='load "path/to/my run"', command=command))
    before = readme.read_text()
    add_results(readme, [RESULT], "### Hens\n\n1.5")
    addressed = address_card(readme, "user/fox")
    text = ModelCard(addressed).text
    assert text.startswith("\n# fox\n") and "# my run" not in text
    python = code(text, "python")
    assert 'from_pretrained("user/fox", dtype' in python and 'prompt="load \\"path/to/my run\\""' in python
    words = shlex.split(code(text, "bash").replace("\\\n", ""))
    assert words[-4:] == ["--config", "user/fox", "--train_data_dir", "path/to/my run"]
    assert "--output_dir 'path/to/my run'" in text
    assert "### Foxes\n\n9.5\n\n### Hens\n\n1.5" in text
    data = ModelCard(addressed).data
    assert data.model_name == "fox" and data.eval_results == [RESULT] and data.widget == ModelCard(before).data.widget


def test_an_address_is_exchanged(tmp_path):
    readme = write_model_card(tmp_path, card(revision="v1"))
    readme.write_text(readme.read_text().replace("# fox-lpl", "# Foxes!\n\nBy me.") + "\n## Thanks\n\nTo all foxes.\n")
    addressed = address_card(readme, "team/hen", "v2")
    assert "# Foxes!" in addressed and "## Thanks\n\nTo all foxes." in addressed  # its owner's words
    assert "--config team/hen@v2" in addressed and 'from_pretrained("team/hen", revision="v2", dtype' in addressed
    assert "user/fox-lpl" not in addressed
    readme.write_text(addressed)
    assert 'from_pretrained("team/hen", dtype' in address_card(readme, "team/hen")


@pytest.mark.parametrize("adapter", ["lora", "loha", "oft"])
def test_an_adapter_keeps_its_base_though_it_be_called_the_same(adapter, tmp_path):
    folder = tmp_path / "run" / "fox"
    (tmp_path / "fox").mkdir()
    facts = {"lora_rank": 4, "adapter": adapter, "base_model": str(tmp_path / "fox"), "repo_id": None}
    python = code(address_card(write_model_card(folder, card(**facts)), "user/hen"), "python")
    assert 'pipeline = StableDiffusionPipeline.from_pretrained("path/to/fox"' in python
    assert 'pipeline.load_lora_weights("user/hen"' in python


@pytest.mark.parametrize(
    "text", ["# Mine\n\nA card of my own.\n", "## Train it again\n\n```bash\na 'b --config\n```\n"]
)
def test_a_card_without_an_address_stays(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(f"---\ntags:\n- a\n---\n{text}")
    assert address_card(readme, "user/fox") == readme.read_text()


# Any text


ANY = st.text(max_size=30) | st.text(st.characters(), max_size=10)


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(prompts=st.lists(ANY, min_size=1, max_size=3), name=st.text("ab .'\"`$狐-", min_size=1, max_size=9))
def test_any_prompt_is_an_example_and_any_folder_gets_an_address(prompts, name, tmp_path_factory):
    folder = put_samples(tmp_path_factory.mktemp("any") / f"x{name}", "step-001000", prompts)
    facts = {"prompt": prompts[0], "repo_id": None, "command": ["train.py", "--validation_prompts", *prompts]}
    readme = write_model_card(folder, card(**facts))
    examples = metadata_load(readme).get("widget", [])
    texts = [without_secrets(prompt).encode(errors="replace").decode() for prompt in prompts if prompt.strip()]
    assert [example["text"] for example in examples] == texts
    addressed = ModelCard(address_card(readme, "user/fox"))
    assert 'from_pretrained("user/fox", dtype' in addressed.text and "--config user/fox\n" in addressed.text
    assert addressed.data.to_dict() == ModelCard.load(readme).data.to_dict()
