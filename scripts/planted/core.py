"""Bugs in `core`."""

from __future__ import annotations

from .bug import Bug

CASES = "tests/contract/test_3_each_case.py"
ARGUMENTS = "tests/core/test_arguments.py"
MISTAKES = "tests/core/test_mistakes.py"
MINE = "tests/contract/test_my_variant.py"
TARGETS = "tests/runtime/test_targets.py"

BUGS = [
    Bug(
        "alpha = r hides a factor",
        "core/config.py",
        "return self.effective_alpha / self.r",
        "return 1.0",
        "tests/equations/test_lora_starts.py",
    ),
    Bug(
        "a start of one argument does not know its adapter's seed",
        "core/spec.py",
        "own.manual_seed(generator.initial_seed())",
        "own.manual_seed(0)",
        MISTAKES + " -k one_argument",
    ),
    Bug(
        "from_dict of the base class stays the base class",
        "core/config.py",
        'cls = CLASSES.get(str(data.get("variant")), cls)',
        "pass",
        MISTAKES + " -k a_dict",
    ),
    Bug(
        "the first matching rank pattern wins",
        "core/config.py",
        'if matches(pattern, path):\n                changes["r"] = r',
        'if matches(pattern, path):\n                changes.setdefault("r", r)',
        TARGETS,
    ),
    Bug(
        "alpha patterns forgotten", "core/config.py", 'changes["alpha"] = alpha\n', "pass\n", TARGETS + " -k overrides"
    ),
    Bug(
        "a pattern matches the end of a word",
        "core/config.py",
        r're.fullmatch(rf"(?:.*\.)?(?:{pattern})", p)',
        r're.fullmatch(rf"(?:.*)?(?:{pattern})", p)',
        TARGETS + " -k segments",
    ),
    Bug(
        "a pattern matches the beginning of a name",
        "core/config.py",
        "any(re.fullmatch(rf",
        "any(re.match(rf",
        TARGETS + " -k segments",
    ),
    Bug(
        "True is taken for a number",
        "core/config.py",
        "if hint is int and isinstance(value, int) and not isinstance(value, bool):",
        "if hint is int and isinstance(value, int):",
        CASES + " -k configs",
    ),
    Bug(
        "dropout 1 allowed",
        "core/config.py",
        "if not 0 <= self.dropout < 1:",
        "if not 0 <= self.dropout <= 1:",
        CASES + " -k configs",
    ),
    Bug(
        "an unknown config key passes",
        "core/config.py",
        "                if unknown is None:\n",
        "                if False:\n",
        "tests/contract/test_3_nothing_silent.py -k lora-wrong_calls",
    ),
    Bug(
        "listing shows one too few",
        "core/errors.py",
        "{len(items) - n} more",
        "{len(items) - n - 1} more",
        "tests/core",
    ),
    Bug(
        "the nearest name is not proposed",
        "core/errors.py",
        "if not near:  # paths differ",
        "if near:  # paths differ",
        "tests/core",
    ),
    Bug(
        "a file's NaN gets in",
        "core/files.py",
        "return bool(low.float().isfinite() and high.float().isfinite())",
        "return bool(low.float().isfinite() or high.float().isfinite())",
        "tests/trust/test_strangers_files.py -k not_finite",
    ),
    Bug(
        "first and last tokens swapped",
        "core/positions.py",
        "    return p, s\n",
        "    return s, p\n",
        "tests/runtime/test_positions.py -k only_these",
    ),
    Bug(
        "zero tokens allowed",
        "core/positions.py",
        "    if p + s == 0:\n",
        "    if p + s < 0:\n",
        "tests/runtime/test_positions.py -k wrong_words",
    ),
    Bug(
        "a name that is taken",
        "core/registry.py",
        "return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)",
        "return old.__module__ == new.__module__",
        "tests/core/test_words.py",
    ),
    Bug(
        "the registry in order of registration",
        "core/registry.py",
        "for name in sorted(_TABLE)]",
        "for name in _TABLE]",
        "tests/core",
    ),
    Bug(
        "the shared fields are lost with the general config",
        "core/registry.py",
        "return variant.config(**cfg.common())",
        "return variant.config(r=cfg.r, alpha=cfg.alpha)",
        "tests/core",
    ),
    Bug(
        "kaiming counts the outputs",
        "core/spec.py",
        "1 / math.sqrt(t.shape[-1])",
        "1 / math.sqrt(t.shape[0])",
        "tests/core",
    ),
    Bug(
        "the deviation of a normal start is forgotten",
        "core/spec.py",
        "t.normal_(std=float(value), generator=generator)",
        "t.normal_(generator=generator)",
        "tests/core",
    ),
    Bug(
        "buffers are trained",
        "core/spec.py",
        "return self.trainable and not self.as_buffer",
        "return self.trainable",
        "tests/contract/test_training.py -k pissa-gradients",
    ),
    Bug(
        "a method that only shares tensors does not train",
        "core/variant.py",
        "return page.shared_specs is not None or any(",
        "return any(",
        "tests/core/test_variant.py",
    ),
    Bug(
        "a method with another start than the base is exact",
        "core/variant.py",
        "lambda page: page.identity_bound == 0,",
        "lambda page: page.identity_bound >= 0,",
        "tests/core/test_variant.py",
    ),
    Bug(
        "a bool is a whole number",
        "core/arguments.py",
        "return not isinstance(value, bool) and isinstance(value, Integral)",
        "return isinstance(value, Integral)",
        ARGUMENTS + " -k in_words",
    ),
    Bug(
        "missing arguments are left to Python",
        "core/arguments.py",
        "missing = [name for name in self.needed if name not in values]",
        "missing = []",
        ARGUMENTS + " -k missing",
    ),
]
