"""The notebooks run from top to bottom, in a kernel of their own, and come to what they tell."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))

# Run behind the last cell of each: what the texts between the cells tell.
CHECKS = {
    "01_first_chat": """
assert answer == "2"
assert [message["content"] for message in session.history[1::2]] == ["circle", "blue", "red"]
assert (output.mode, output.text, output.reasoning.splitlines()[-1]) == ("deep", "17", "9+8=17")
""",
    "02_video": """
assert [len(sampled[packing].frames) for packing in sampled] == [16, 16, 16]
assert [len(sampled[packing].temporal_ids) for packing in sampled] == [16, 6, 3]
assert list(answers.values()) == ["right", "red"]
assert (len(frames), answer) == (6, "right")
assert [(part.start, part.end, part.text) for part in segments] == [(0, 1, "red"), (1, 2, "red")]
""",
    "03_documents": """
assert [page.number for page in texts] == [1, 2] and all(page.text for page in texts)
assert [page.text.splitlines()[-1] for page in texts] == ["TOTAL: 12.50", "7+5-3+8"]
assert result.text == "12.50 [page 1]"
assert data == {"total": 12.5, "date": "21/11"}
assert [box.corners for box in boxes] == [(70.4, 91.2, 262.4, 283.2)] and len(malformed) == 1
assert len(found.boxes) == 1 and max(abs(a - b) for a, b in zip(found.boxes[0].corners, (65, 145, 255, 335))) < 40
""",
    "04_fine_tuning": """
assert before != "a CUP" and after == "a CUP"
assert losses[-1] < losses[0] / 10
assert (output / "adapter" / "adapter_model.safetensors").is_file()
assert not (output / "merged" / "adapter_config.json").exists()
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook_runs_from_top_to_bottom(notebook, warm_python, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    content = nbformat.read(notebook, as_version=4)
    content.cells.append(nbformat.v4.new_code_cell(CHECKS[notebook.stem]))
    client = NotebookClient(
        content, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}}
    )
    client.create_kernel_manager().kernel_spec.argv[0] = warm_python
    client.execute()  # raises what a cell raises


def test_every_notebook_has_its_check():
    assert list(CHECKS) == [notebook.stem for notebook in NOTEBOOKS]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebook_is_stored_without_outputs_and_its_links_lead_somewhere(notebook):
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code if cell.outputs or cell.execution_count] == []
    text = "\n".join(cell.source for cell in content.cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", text)
    assert [target for target in targets if not (notebook.parent / target).exists()] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_one_line_of_a_notebook_chooses_the_weights(notebook):
    content = nbformat.read(notebook, as_version=4)
    code = "\n".join(cell.source for cell in content.cells if cell.cell_type == "code")
    assert re.findall(r".*nano.*", code) == [
        'name = repository / "nano"  # for the published weights, after `minicpmv fetch`: name = repository'
    ]
