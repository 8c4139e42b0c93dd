"""Bugs of the kinds that users suffer from: for each class of tests/trust one that its file must see."""

from __future__ import annotations

from .bug import Bug

T = "tests/trust/test_"

BUGS = [
    Bug(
        "B1: missing and foreign tensors of a file are ignored",
        "io/native.py",
        "    if missing or extra:\n",
        "    if False:\n",
        T + "b01_loads_acts_as_base.py",
    ),
    Bug(
        "B2: a target whose weight a function reads goes unnamed",
        "runtime/check.py",
        "    if dead:\n",
        "    if False:\n",
        "tests/contract/test_3_each_case.py -k learn_nothing",
    ),
    Bug(
        "B3: Conv1D is merged as it lies",
        "runtime/layers/linear.py",
        "return stored.mT if is_conv1d(module) else stored",
        "return stored",
        T + "b03_merged_is_not_adapted.py",
    ),
    Bug(
        "B4: unmerging leaves a bit of the merge",
        "runtime/merge.py",
        "    original.weight = kept.cpu()\n",
        "    original.weight = (kept.cpu() * 0.99).to(kept.dtype)\n",
        T + "b04_merge_in_low_precision.py",
    ),
    Bug(
        "B5: an entry that matches nothing passes",
        "runtime/targets/choose.py",
        "            if n == 0:\n",
        "            if n < 0:\n",
        T + "b05_other_targets_than_meant.py",
    ),
    Bug(
        "B6: a compiled model is taken for the user's",
        "runtime/model/state.py",
        '        if "_orig_mod" in model._modules:\n',
        '        if "_origin" in model._modules:\n',
        T + "b06_hollow_save.py",
    ),
    Bug(
        "B7: a trained stranger is taken for the adapter's by its name",
        "io/native.py",
        "if p.requires_grad and id(p) not in own]",
        'if p.requires_grad and "lora_" not in n]',
        T + "b07_side_parts.py",
    ),
    Bug(
        "B8: a tied head is merged into the embedding",
        "runtime/merge.py",
        "    if len(tied) < 2 or _moves_together(records, tied):\n",
        "    if True:\n",
        T + "b08_tied_weights.py",
    ),
    Bug(
        "B9: a frozen adapter goes on training",
        "runtime/handle.py",
        "                tensor.requires_grad_(bool(value))\n",
        "                tensor.requires_grad_(True)\n",
        T + "b09_wrong_adapter_trains.py",
    ),
    Bug(
        "B10: a resumed schedule begins anew",
        "io/header.py",
        "cfg, targets, steps=steps, total_steps=total)",
        "cfg, targets, total_steps=total)",
        T + "b10_resume_restarts.py",
    ),
    Bug(
        "B11: the output is upcast",
        "runtime/call/hooks.py",
        "return new if new.dtype == old.dtype else new.to(old.dtype)",
        "return new.float()",
        T + "b11_dtype_stalls.py",
    ),
    Bug(
        "B12: a file forgets the scales of single targets",
        "io/header.py",
        '({"config": own} if own else {})',
        "{}",
        T + "b12_scale_lost.py",
    ),
    Bug(
        "B13: hooks stay after detach",
        "runtime/commit.py",
        "    kind.part(layer, path, _hooks(kind))\n",
        "    pass\n",
        T + "b13_hook_life_cycle.py",
    ),
    Bug(
        "B14: the update is made dense",
        "ops/lowrank.py",
        "    return add_lowrank(y, shrink(x, A), B, s)\n",
        "    return y + s * (x @ (B @ A).mT)\n",
        T + "b14_cost_blow_ups.py",
    ),
    Bug(
        "B15: a schedule that nobody steps passes",
        "runtime/call/root.py",
        "if record.train_calls > 1:",
        "if record.train_calls > 2:",
        T + "b15_contract_not_met.py",
    ),
    Bug(
        "S1: what is no safetensors file is tried as a pickle",
        "io/load.py",
        "    return load_native(_home(model, Path(path), Path(path), name), path, name, trainable, base_check)\n",
        "    import torch\n\n    try:\n        torch.load(path, weights_only=False)\n"
        "    except Exception:\n        pass\n"
        "    return load_native(_home(model, Path(path), Path(path), name), path, name, trainable, base_check)\n",
        T + "s1_pickles_are_refused.py",
    ),
    Bug(
        "S2: a module on the load path could unpickle",
        "io/tensors.py",
        "import zlib\n",
        "import pickle\nimport zlib\n",
        T + "s2_loading_runs_nothing.py",
    ),
    Bug(
        "S3: a dtype of a file is any word",
        "core/config.py",
        "        if self.dtype not in DTYPES:\n",
        "        if False:\n",
        T + "s3_hostile_configs.py",
    ),
    Bug(
        "S4: the patterns of a file are run",
        "io/header.py",
        '        check_scale(cfg.scale, "the config")\n',
        '        check_scale(cfg.scale, "the config")\n        [cfg.for_target(path) for path in head["targets"]]\n',
        T + "s4_patterns_of_strangers.py",
    ),
    Bug(
        "S5: what is not finite is loaded",
        "core/files.py",
        "return bool(low.float().isfinite() and high.float().isfinite())",
        "return bool(low.float().isfinite())",
        T + "s5_damaged_files.py",
    ),
    Bug(
        "S6: a file is written in its place",
        "io/tensors.py",
        "save_file(tensors, temp, metadata)",
        "path.write_bytes(b''); save_file(tensors, temp, metadata)",
        T + "s6_saves_are_atomic.py",
    ),
    Bug(
        "random steps: the weights of adapters are forgotten",
        "runtime/view/composed.py",
        "return new if is_one(weight) or new is old else old + weight * (new - old)",
        "return new",
        T + "random_replay.py -k files_say",
    ),
    Bug(
        "architectures: Conv1D is merged as it lies",
        "runtime/layers/linear.py",
        "return stored.mT if is_conv1d(module) else stored",
        "return stored",
        T + "architectures.py -k gpt2-merges",
    ),
]
