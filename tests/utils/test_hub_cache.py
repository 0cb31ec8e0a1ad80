"""Where a model lies on this machine."""

from pathlib import Path

import pytest

from verl.utils.hub_cache import local_model_folder


def test_a_folder_a_cached_name_and_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    references = tmp_path / "models--owner--name" / "refs"
    references.mkdir()
    (references / "main").write_text("abc")
    (tmp_path / "own").mkdir()
    assert local_model_folder("owner/name") == snapshot
    assert local_model_folder(str(tmp_path / "own")) == local_model_folder("~/own") == tmp_path / "own"
    for nothing in (None, "", "owner/other", "no such/na me", str(tmp_path / "absent")):
        assert local_model_folder(nothing) is None, nothing
