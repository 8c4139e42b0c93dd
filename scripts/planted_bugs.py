"""Plant known bugs in a copy of the package, one at a time, and show that the tests named beside each turn red.

    python scripts/planted_bugs.py [--jobs 2] [--only NAME ...]

Exits with 1 when a bug survives, when its text is no longer in the source, or when the tests are red without any bug.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "lora_lite"


@dataclass(frozen=True)
class Bug:
    """One mutation: `old` stands exactly once in `file`; `tests` are pytest arguments that must fail once it reads `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def mutated(self) -> str | None:
        """The file with the bug, or None where `old` is not there exactly once."""
        text = (SRC / self.file).read_text()
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


CONTRACT = "tests/contract/"
BUGS = [
    Bug("rotation transposed", "variants/oft.py", "Q = skew(theta, b)", "Q = skew(theta, b).mT", "tests/equations/test_oft.py"),
    Bug("reflections in the other order", "variants/hra.py", "a, b = U.view(len(first), 2, -1).unbind(1)", "b, a = U.view(len(first), 2, -1).unbind(1)", "tests/equations/test_hra.py"),
    Bug("scale forgotten", "variants/_lowrank.py", "layer.lora_A, layer.lora_B, layer.cfg.scale)", "layer.lora_A, layer.lora_B, 1.0)", "tests/io/test_native.py -k golden"),
    Bug("alpha = r hides a factor", "core/config.py", "return self.effective_alpha / self.r", "return 1.0", "tests/equations/test_eva.py"),
    Bug("rsLoRA without its root", "variants/_lowrank.py", "self.r**0.5 if self.use_rslora", "self.r if self.use_rslora", "tests/equations/test_lora_starts.py tests/io/test_peft_layout.py tests/parity/test_lowrank.py"),
    Bug("norm not detached", "variants/dora.py", "with torch.no_grad():", "with torch.enable_grad():", "tests/equations/test_dora.py"),
    Bug("bias inside the magnitude", "variants/dora.py", "h.to(y.dtype), layer.bias, s)", "h.to(y.dtype), None, s)", "tests/equations/test_dora.py"),
    Bug("base weight written in init", "variants/dora.py", "layer.lora_norm = layer.row_norms()", "layer.lora_norm = layer.row_norms(); layer.weight.mul_(0.5)", CONTRACT + "test_1_base_read_only.py -k dora"),
    Bug("global random numbers", "runtime/staging.py", "spec.fill(t, generator_for(self.cfg.seed, self.target.path, short))", "spec.fill(t, torch.default_generator)", CONTRACT + "test_7_same_seed.py -k lora-"),
    Bug("start depends on the adapter's name", "runtime/staging.py", "generator_for(self.cfg.seed, self.target.path, short)", "generator_for(self.cfg.seed, self._record.name, self.target.path, short)", CONTRACT + "test_7_same_seed.py -k lora-"),
    Bug("start draws outside of its fork", "runtime/attach.py", "with torch.no_grad(), torch.random.fork_rng(devices=[]):", "with torch.no_grad():", CONTRACT + "test_4_all_or_nothing.py -k failed_attach"),
    Bug("hooks left behind", "runtime/attach.py", "                _remove_hooks(layer, HOOKS)\n", "                pass\n", CONTRACT + "test_1_base_read_only.py -k lora-"),
    Bug("requires_grad not restored", "runtime/attach.py", "                parameters[n].requires_grad_(True)\n", "                pass\n", CONTRACT + "test_1_base_read_only.py -k lora-"),
    Bug("half an attach", "runtime/attach.py", "if hasattr(view.module, attribute):", "if False:", CONTRACT + "test_3_each_case.py -k strange"),
    Bug("taken names accepted", "runtime/attach.py", "    if name in state.records:\n", "    if False:\n", CONTRACT + "test_3_each_case.py -k names"),
    Bug("rows gathered in another order", "runtime/rows.py", "[i * each + k for i, row in enumerate(rows) if row == name for k in range(each)]", "[i + k * len(rows) for i, row in enumerate(rows) if row == name for k in range(each)]", CONTRACT + "test_selection.py -k rows_equal"),
    Bug("rows see the adapters of others", "runtime/grouped.py", "z = torch.where(mask.view(mask.shape[0], *(1,) * (x.dim() - 2), mask.shape[1]), x @ stack.A.mT, 0)", "z = x @ stack.A.mT", "tests/runtime/test_grouped_rows.py"),
    Bug("selection not restored after an exception", "runtime/select.py", "    try:\n        yield\n    finally:\n        state.active", "    yield\n    if True:\n        state.active", CONTRACT + "test_selection.py -k restores"),
    Bug("recomputation under the present selection", "runtime/recompute.py", "    return state.pending[0]", "    return chosen", "tests/smoke/test_checkpointing.py -k after_the_block"),
    Bug("two pending selections let pass", "runtime/recompute.py", "if len(state.pending) > 1:", "if len(state.pending) > 9:", "tests/smoke/test_checkpointing.py -k pending"),
    Bug("weights of adapters forgotten", "runtime/rows.py", "return new if weight == 1.0 else old + weight * (new - old)", "return new", CONTRACT + "test_selection.py -k lora-selection_restores"),
    Bug("dropout in eval", "runtime/layer.py", "if not (p and self._module.training):", "if not p:", CONTRACT + "test_training.py -k dropout"),
    Bug("merge forgets the bias", "runtime/merge.py", "        old_bias.copy_(bias.to(old_bias.dtype))\n", "        pass\n", CONTRACT + "test_5_merge.py -k merge_equals"),
    Bug("merge in low precision", "runtime/merge.py", "else torch.float64\n", "else torch.bfloat16\n", CONTRACT + "test_5_merge.py -k lora-merge"),
    Bug("tied weights merged", "runtime/merge.py", "if len(tied) > 1:", "if len(tied) > 9:", "tests/runtime/test_targets.py -k tied"),
    Bug("Conv1D read as it lies", "runtime/weights.py", "return w.mT if is_conv1d(module) or isinstance(module, nn.Embedding) else w.flatten(1)", "return w.mT if isinstance(module, nn.Embedding) else w.flatten(1)", "tests/smoke/test_foreign_layers.py -k conv1d"),
    Bug("probing without setting the bias aside", "runtime/weights.py", '    owner["bias"] = None\n', "    pass\n", "tests/smoke/test_foreign_layers.py -k fake"),
    Bug("saving by name instead of ownership", "io/native.py", "if p.requires_grad and id(p) not in own]", 'if p.requires_grad and "lora_" not in n]', CONTRACT + "test_3_each_case.py -k strange"),
    Bug("unexpected keys ignored", "io/native.py", "    if missing or extra:\n", "    if missing:\n", CONTRACT + "test_4_all_or_nothing.py -k failed_load"),
    Bug("overrides of targets not saved", "io/native.py", '({"config": own} if own else {})', "{}", "tests/io/test_native.py -k scales"),
    Bug("another base loads without a word", "io/native.py", '    if base_check != "ignore":\n', "    if False:\n", CONTRACT + "test_saving.py -k wrong_base"),
    Bug("file written in its place", "io/native.py", "save_file(tensors, temp, metadata)", "save_file(tensors, str(path), metadata); save_file(tensors, temp, metadata)", "tests/io/test_native.py -k failed_write"),
    Bug("loaded adapters train", "runtime/attach.py", "grad = trainable and spec.is_trained", "grad = spec.is_trained", CONTRACT + "test_saving.py -k round_trip"),
    Bug("calibration leaves the model in eval mode", "runtime/calibrate.py", "            m.training = mode\n", "            pass\n", CONTRACT + "test_4_all_or_nothing.py -k eva"),
    Bug("calibration counts padding", "runtime/calibrate.py", "        x = x[mask.to(x.device)]\n", "        pass\n", "tests/runtime/test_calibrate.py"),
    Bug("a dead pattern ignored", "runtime/plan.py", "            if n == 0:\n", "            if n < 0:\n", "tests/runtime/test_targets.py -k names_overrides"),
    Bug("the head adapted by default", "runtime/plan.py", "elif cfg.target_names is None and s.is_head:", "elif False:", "tests/runtime/test_targets.py -k without_blocks"),
    Bug("the widest layer taken for the stream", "runtime/structure.py", "return min((width for width, n in count.items() if n == max(count.values())), default=None)", "return max(count, default=None)", "tests/runtime/test_targets.py -k commonest"),
]  # fmt: skip


def run(tests: list[str], package: Path) -> tuple[int, str]:
    """(exit status, last line) of pytest with the package at `package` first on the path."""
    env = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    code = (
        f"import sys, lora_lite, pytest; assert lora_lite.__file__.startswith({str(package)!r}), lora_lite.__file__; "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    words = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-m", "not slow", *tests]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
    )
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    failed = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else "")
    return done.returncode, failed


def split(tests: str) -> list[str]:
    """Words of a pytest command line; files that do not exist are left out."""
    return [w for w in shlex.split(tests) if not w.endswith(".py") or (ROOT / w).exists()]


def plant(bug: Bug) -> tuple[Bug, str, str, float]:
    """(bug, "killed" / "survived" / "gone", the test that failed, seconds)."""
    start = time.perf_counter()
    text = bug.mutated()
    if text is None:
        return bug, "gone", f"{bug.file} does not hold the text once: {bug.old.strip()[:60]}", 0.0
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(SRC, Path(folder) / "lora_lite", ignore=shutil.ignore_patterns("__pycache__", "base"))
        (Path(folder) / "lora_lite" / bug.file).write_text(text)
        status, line = run(split(bug.tests), Path(folder))
    # 1: tests failed. Anything else but 0 is no verdict of a test: no test chosen, a broken command line
    verdict = {0: "survived", 1: "killed"}.get(status, f"no verdict ({status})")
    return bug, verdict, line, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="bugs at a time")
    parser.add_argument("--only", nargs="*", default=[], help="words; only bugs whose name holds one of them")
    args = parser.parse_args()
    bugs = [b for b in BUGS if not args.only or any(word in b.name for word in args.only)]
    start = time.perf_counter()
    bad, killers = 0, []
    print(f"{'verdict':10} {'s':>5}  bug")
    with ThreadPoolExecutor(args.jobs) as pool:
        for bug, verdict, line, seconds in pool.map(plant, bugs):
            bad += verdict != "killed"
            if verdict == "killed":
                killers.append(line.removeprefix("FAILED ").removeprefix("ERROR ").split(" - ")[0])
            print(f"{verdict:10} {seconds:5.1f}  {bug.name} ({bug.file})", flush=True)
            print(f"{'':18}{line[:150]}", flush=True)
    if killers:  # a test that is always red kills everything
        status, line = run(killers, SRC.parent)
        if status:
            bad += 1
            print(f"red without any bug: {line}")
    print(f"{len(bugs)} bugs, {bad} not in order, {time.perf_counter() - start:.0f} s")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
