"""The folder of a run: what it holds, how it is opened and replaced, and from where it goes on."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lora_lite as ll

from ._log import LOG

ADAPTER, RUN, SETTINGS = "adapter.safetensors", "run.json", "run.yaml"
OURS = re.compile(r"adapter\.safetensors|run\.(json|yaml)|log\.jsonl|loss\.png|loss\.tmp\.png|checkpoint-\d+")
"""What a run writes; --overwrite replaces this and nothing else."""
LAYOUT = "layout"
"""Entry of `run.json`: the chat template by which a turn reads as the run's prompts, where those were text."""
STATES = {"optimizer.pt": ("state", "param_groups"), "scheduler.pt": ("last_epoch",), "rng_state.pth": ("python",)}
"""What a checkpoint holds beside the adapter, and what must stand in each."""
BEFORE = "replaced-run"
"""Where the old run waits until the new one has finished."""


def check_folder(out: Path, overwrite: bool) -> list[str]:
    """The files of an earlier run in the folder of a new one, which changes nothing yet.

    Raises:
        FileError: it holds a run and may not be overwritten, it is a file, or nothing can be written there.
    """
    ours = own_files(out)
    check_writable(out)
    if ours and not overwrite:
        raise ll.FileError(
            f"--out {out} holds a run already ({', '.join(ours[:3])}). Give another folder, or --overwrite to replace "
            "that run."
        )
    return ours


def own_files(out: Path) -> list[str]:
    """Names of what runs wrote into a folder."""
    return sorted(p.name for p in out.iterdir() if OURS.fullmatch(p.name)) if out.is_dir() else []


def check_writable(out: Path) -> None:
    """Try to write where the folder is or will be.

    Raises:
        FileError: that cannot be done; the reason is the system's.
    """
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ll.FileError(f"--out {out}: {place} is a file; give a folder.")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as e:
        raise ll.FileError(f"--out {out}: nothing can be written in {place} ({e.strerror}).") from None


@contextmanager
def opened(out: Path, fresh: bool = True) -> Iterator[None]:
    """The folder of a run that is being made. An earlier run is set aside, deleted once this one has ended well, and
    put back if this one fails before it has a checkpoint. One that fails before its first step leaves nothing."""
    old = out / BEFORE
    if fresh and (names := own_files(out)):
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir()
        for name in names:
            (out / name).rename(old / name)
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as e:
        if fresh and not checkpoints(out) and (old.is_dir() or not (out / LOG).is_file()):
            for name in own_files(out):
                _remove(out / name)
            for path in old.iterdir() if old.is_dir() else ():
                path.rename(out / path.name)
            shutil.rmtree(old, ignore_errors=True)
        if isinstance(e, OSError) and e.errno and e.filename is None:  # a full disk does not say where
            raise OSError(e.errno, e.strerror, str(out)) from None
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_run(out: Path, facts: dict[str, Any]) -> None:
    """`run.json`: everything that decides the run."""
    (out / RUN).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


# ---- what a run knows


def adapter_path(given: Path) -> Path:
    """The adapter of a run folder; any other path as it is."""
    if (given / RUN).is_file() and not (given / ADAPTER).is_file():
        raise ll.FileError(
            f"{given} holds a run that has not finished: there is no {ADAPTER}. Add --resume to its command."
        )
    return given / ADAPTER if (given / ADAPTER).is_file() else given


def facts_of(adapter: Path | None) -> dict[str, Any]:
    """`run.json` beside an adapter, or of its run folder; empty where there is none."""
    if adapter is None:
        return {}
    folder = adapter if adapter.is_dir() else adapter.parent
    for place in (folder, folder.parent):
        path = place / RUN
        if path.is_file():
            try:
                found = json.loads(path.read_text())
            except (OSError, ValueError):
                raise ll.FileError(f"{path} is damaged; name the base with --model.") from None
            return found if isinstance(found, dict) else {}
    return {}


def model_of(given: str | None, *adapters: Path | None) -> str:
    """The base that a flag names, or the one of the adapters' runs or PEFT folders, or the bundled one."""
    if given is not None:
        return given
    named = [facts_of(a).get("model") or peft_base(a) for a in adapters]
    return next((name for name in named if isinstance(name, str)), "demo")


def peft_base(adapter: Path | None) -> str | None:
    """The base that a folder in PEFT's layout names."""
    path = (adapter or Path()) / "adapter_config.json"
    if adapter is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads the adapter says what is wrong with it
        return None
    name = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    return name if isinstance(name, str) and name else None


# ---- going on


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if p.is_dir() and OURS.fullmatch(p.name)] if out.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def last_checkpoint(out: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of a run, and a sentence on every damaged one after it.

    Raises:
        FileError: there is none.
    """
    found, said = checkpoints(out), []
    for path in reversed(found):
        damage = damage_of(path)
        if damage is None:
            return path, said
        said.append(f"{path.name} is damaged ({damage}) and left alone")
    if found:
        raise ll.FileError(
            f"--resume: no checkpoint in {out} is whole: {'; '.join(said)}. Start again with --overwrite."
        )
    raise ll.FileError(
        f"--resume: {out} holds no checkpoint. Start the run without --resume, with --save-every above 0."
    )


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        step_of(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return "trainer_state.json is missing or cut short"
    try:
        from ..io import native

        native.read(checkpoint / ADAPTER)
    except (OSError, ll.LoraLiteError):
        return f"{ADAPTER} is missing or cut short"
    for name, keys in STATES.items():
        path = checkpoint / name
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
        except (OSError, zipfile.BadZipFile):
            bad = name
        if bad is not None:
            return f"{name} is missing or cut short"
        if not holds(path, keys):
            return f"{name} is empty"
    return None


def holds(path: Path, keys: Sequence[str]) -> bool:
    """Whether a file of `torch.save` is a table that has something under each of the keys."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # numpy's random state is no tensor: whoever loads it allows that
        return True
    except (RuntimeError, EOFError):
        return False
    return isinstance(found, dict) and all(found.get(key) not in (None, {}, []) for key in keys)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text())["global_step"])


def check_same_run(out: Path, facts: dict[str, Any]) -> None:
    """Resuming goes on with the same run: whatever decides it must be as before; more steps are allowed.

    Raises:
        FileError: a setting or the data differ; each is named.
    """
    path = out / RUN
    try:
        before = json.loads(path.read_text())
    except OSError:
        raise ll.FileError(f"--resume: {out} holds no {RUN}.") from None
    except ValueError:
        before = None
    if not isinstance(before, dict) or not isinstance(before.get("config"), dict):
        raise ll.FileError(f"--resume: {path} is damaged; start again with --overwrite.")
    old, new = flat(before), flat(facts)
    old.pop(LAYOUT, None)  # follows from the rows, which are compared
    if isinstance(old.get("steps"), int) and new["steps"] > old["steps"]:
        old["steps"] = new["steps"]
    other = [f"{k}: {old.get(k)!r} before, {new.get(k)!r} now" for k in {**old, **new} if old.get(k) != new.get(k)]
    if len(other) == 1 and "tokens" in other[0][:8]:
        other = [f"the rows of {facts['data']} are not those it was trained on"]
    if other:
        raise ll.FileError(
            f"--resume goes on with the same run, and this one differs ({'; '.join(other)}). Give the same flags, or "
            "another --out."
        )


def flat(facts: dict[str, Any]) -> dict[str, Any]:
    """The entries of the config beside the others."""
    return {**{k: v for k, v in facts.items() if k != "config"}, **facts.get("config", {})}
