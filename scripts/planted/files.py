"""Bugs in `io`, `cost` and `interop`."""

from __future__ import annotations

from .bug import Bug

C = "tests/contract/"
IO = "tests/io/"
NATIVE = IO + "test_native.py"
PEFT = IO + "test_peft_layout.py"
TRAINER = "tests/interop/test_trainer.py"
COST = "tests/runtime/test_cost.py"

BUGS = [
    Bug(
        "a shard is taken for the whole",
        "io/gather.py",
        'return t.full_tensor() if hasattr(t, "full_tensor") else t',
        "return t",
        "tests/smoke/test_processes.py -k fsdp2",
    ),
    Bug(
        "overrides of targets not saved",
        "io/header.py",
        '({"config": own} if own else {})',
        "{}",
        NATIVE + " -k scales",
    ),
    Bug(
        "an edited scale passes",
        "io/header.py",
        "> 1e-6 * abs(own.scale):",
        "> 1e6 * abs(own.scale):",
        NATIVE + " -k hostile",
    ),
    Bug(
        "a newer format is read",
        "io/header.py",
        'if head["format"] > FORMAT or',
        'if head["format"] > FORMAT + 9 or',
        NATIVE + " -k newer",
    ),
    Bug(
        "the steps of a schedule are not read",
        "io/header.py",
        "cfg, targets, steps=steps, total_steps=total)",
        "cfg, targets, total_steps=total)",
        "tests/runtime/test_schedule.py -k save_and_load",
    ),
    Bug(
        "an unknown way of checking the base",
        "io/load.py",
        'if base_check not in ("error", "warn", "ignore"):',
        'if base_check == "":',
        NATIVE + " -k within_its_rounding",
    ),
    Bug(
        "loaded adapters always train",
        "io/load.py",
        "load_native(unwrap(model), path, name, trainable, base_check)",
        "load_native(unwrap(model), path, name, True, base_check)",
        C + "test_saving.py -k lora-round_trip",
    ),
    Bug(
        "saving by name instead of ownership",
        "io/native.py",
        "if p.requires_grad and id(p) not in own]",
        'if p.requires_grad and "lora_" not in n]',
        C + "test_3_each_case.py -k strange",
    ),
    Bug(
        "unexpected keys ignored",
        "io/native.py",
        "    if missing or extra:\n",
        "    if missing:\n",
        C + "test_4_all_or_nothing.py -k lora-failed_load",
    ),
    Bug(
        "another base loads without a word",
        "io/native.py",
        '    if base_check != "ignore":\n',
        "    if False:\n",
        C + "test_saving.py -k lora-wrong_base",
    ),
    Bug(
        "every base is compared as if it were bf16",
        "io/native.py",
        '{"bfloat16": 2**-7, "float16": 2**-9}.get(str(d), 2**-18)',
        "2**-7",
        NATIVE + " -k own_rounding",
    ),
    Bug(
        "a half-precision base is compared as if it were whole",
        "io/native.py",
        '{"bfloat16": 2**-7, "float16": 2**-9}.get(str(d), 2**-18)',
        "2**-18",
        NATIVE + " -k own_rounding",
    ),
    Bug(
        "buffers are not loaded from a state dict",
        "io/native.py",
        "        for key, tensor in own.items():\n            tensor.copy_",
        "        for key, tensor in own.items():\n            isinstance(tensor, nn.Parameter) and tensor.copy_",
        C + "test_saving.py -k hra-round_trip",
    ),
    Bug(
        "shapes of a file are not looked at",
        "io/native.py",
        "if tuple(want.shape) != tuple(got[key].shape):",
        "if len(want.shape) != len(got[key].shape):",
        NATIVE + " -k state_dicts",
    ),
    Bug(
        "the file's dtype is not the one asked for",
        "io/native.py",
        "tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}",
        "pass",
        NATIVE + " -k dtypes",
    ),
    Bug(
        "a diverged adapter is saved",
        "io/native.py",
        "bool(torch.isfinite(t).all())]\n    if bad:\n        raise StateError",
        "bool(torch.isfinite(t).any())]\n    if bad:\n        raise StateError",
        C + "test_3_each_case.py -k diverged",
    ),
    Bug(
        "file written in its place",
        "io/tensors.py",
        "save_file(tensors, temp, metadata)",
        "save_file(tensors, str(path), metadata); save_file(tensors, temp, metadata)",
        NATIVE + " -k failed_write",
    ),
    Bug(
        "what was written is not compared",
        "io/tensors.py",
        "any(not torch.equal(f.get_tensor(k), t) for k, t in tensors.items())",
        "False",
        IO + "test_tensors.py -k other_values",
    ),
    Bug(
        "files for nobody else",
        "io/places.py",
        "_take_over(place, Path(name), 0o666 & ~_umask())",
        "pass",
        IO + "test_tensors.py -k mode",
    ),
    Bug(
        "the exported rank is that of the first layer",
        "io/peft.py",
        "r = max(A.shape[0] for A, _ in (*factors.values()",
        "r = next(A.shape[0] for A, _ in (*factors.values()",
        PEFT + " -k peft_reads",
    ),
    Bug(
        "rsLoRA of a folder is not read",
        "io/peft.py",
        'use_rslora=bool(config.get("use_rslora", False))',
        "use_rslora=False",
        PEFT + " -k reads",
    ),
    Bug(
        "a folder's pattern of alpha is not read",
        "io/peft.py",
        'alpha = float(_pattern(config.get("alpha_pattern"), path, config["lora_alpha"]))',
        'alpha = float(config["lora_alpha"])',
        PEFT + " -k reads",
    ),
    Bug(
        "what PEFT means by bias is ignored",
        "io/peft.py",
        'if config.get("bias", "none") != "none":',
        "if False:",
        PEFT + " -k refuses",
    ),
    Bug(
        "experts run slowest in B",
        "io/peft_experts.py",
        "B.view(bank.d_out, r, E).permute(2, 0, 1)",
        "B.view(bank.d_out, E, r).permute(1, 0, 2)",
        "tests/runtime/test_experts.py -k peft_reads",
    ),
    Bug(
        "the order of PEFT's wrappers",
        "io/peft_experts.py",
        "len(mine) - 1 - mine.index(parameter)",
        "mine.index(parameter)",
        "tests/runtime/test_experts.py -k peft_reads",
    ),
    Bug(
        "a head is exported as its difference",
        "io/peft_whole.py",
        'kind.as_stored(module, w + change["lora_W"])',
        'kind.as_stored(module, change["lora_W"])',
        "tests/parity/test_whole.py",
    ),
    Bug(
        "a head's bias is exported as it was",
        "io/peft_whole.py",
        'new = bias.detach().float() + change.get("lora_b", 0.0)',
        "new = bias.detach().float()",
        "tests/parity/test_whole.py",
    ),
    Bug(
        "half of the attention is counted",
        "cost/counting.py",
        "return 2 * rows * heads * T * k[-2] * (d + v[-1])",
        "return 2 * rows * heads * T * k[-2] * d",
        COST + " -k base_itself",
    ),
    Bug(
        "the base's own weights count as kept",
        "cost/counting.py",
        "if key not in self.own and not mask:",
        "if not mask:",
        COST + " -k base_itself",
    ),
    Bug(
        "the adapter's step includes the base's", "cost/paper.py", "step - self.base[1],", "step,", COST + " -k by_hand"
    ),
    Bug(
        "one moment of AdamW",
        "runtime/plan.py",
        "return 2 * 4 * self.trainable",
        "return 4 * self.trainable",
        "tests/runtime/test_plan.py -k sizes",
    ),
    Bug(
        "the penalty counts once per batch of an accumulation",
        "interop/trainer.py",
        "loss = loss + (ll.penalty(self.model) / share)",
        "loss = loss + (ll.penalty(self.model))",
        TRAINER + " -k penalty",
    ),
    Bug(
        "a trainer's checkpoint forgets the step",
        "interop/trainer.py",
        'handle.record.steps = int(head.get("steps") or 0)',
        "pass",
        TRAINER + " -k five_and_five",
    ),
    Bug(
        "another config resumes",
        "interop/trainer.py",
        "        if other:\n",
        "        if False:\n",
        TRAINER + " -k refuses",
    ),
    Bug(
        "another base resumes",
        "interop/trainer.py",
        '        native.check_base(model, handle.record, head, "error", str(path))\n',
        "",
        TRAINER + " -k refuses",
    ),
    Bug(
        "a view counts as a storage of its own",
        "_torch.py",
        "return t.untyped_storage()._cdata",
        "return id(t)",
        "tests/runtime/test_cost.py -k base_itself",
    ),
]
