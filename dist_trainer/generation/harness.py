"""EleutherAI's lm-evaluation-harness (the package lm_eval, the extra `harness`) on a checkpoint, with tasks by name.

A checkpoint is a Hugging Face folder, so lm_eval's own model class opens it and its numbers are those that it gives elsewhere.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dist_trainer.config.cli import in_this_shell
from dist_trainer.config.schema import PrecisionConfig
from dist_trainer.config.secrets import masked_within
from dist_trainer.data.chat import own_template
from dist_trainer.data.template_limits import TemplateLimitError, check_length, check_template, within_limits
from dist_trainer.data.tokenizers import Tokenizer, load_tokenizer, text_prefix
from dist_trainer.errors import ConfigError
from dist_trainer.huggingface import transformers_models
from dist_trainer.huggingface.hub import hub_is_reachable
from dist_trainer.huggingface.weights import locate_weights
from dist_trainer.storage.atomic_file import replace_file
from dist_trainer.training.precision import build_precision

log = logging.getLogger(__name__)

RESULTS_FOLDER = "evaluations"
"""Of a run's folder."""
INSTALL = f"`EXTRAS=harness launch/setup.sh`, or `{in_this_shell()} -m pip install lm_eval accelerate`"
OFFLINE = (
    ". The Hub cannot be reached: bring the task's data into the local cache (HF_HOME) on a machine that reaches it, or name "
    "tasks of your own with data in local files (--harness_tasks)"
)
AUTOCAST = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}
"""lm_eval's names of number formats."""


@dataclass(frozen=True)
class HarnessOptions:
    """What lm_eval is to do."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, patterns of names, or paths of YAML files."""
    tasks_folder: Path | None = None
    """With tasks of the user's own, as YAML files at any depth."""
    num_fewshot: int | None = None
    """Examples before each question; None: as the task has it."""
    limit: int | None = None
    """Questions of each task; None: all."""
    batch_size: int = 8
    """Texts at a time."""
    apply_chat_template: bool = False
    """Whether questions are asked as messages."""


def run_harness(path: Path, options: HarnessOptions, precision: PrecisionConfig) -> dict[str, Any]:
    """What lm_eval's simple_evaluate finds of the model at `path`: its `results` by task and metric, and how it came to them.

    Raises ConfigError where lm_eval is not installed, a task is not known or cannot be loaded; CheckpointError, DataError.
    """
    folder = locate_weights(path)
    tokenizer = load_tokenizer(str(path), key="RUN")
    if options.apply_chat_template and not tokenizer.chat_template:
        raise ConfigError(f"--apply_chat_template: the tokenizer in {folder} has none; leave it out")
    if options.apply_chat_template:
        limit_chat_template(tokenizer, f"the chat template of {folder}")
    online = hub_is_reachable()  # before the import: the data sets' library asks once whether it is to stay offline
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"--harness: lm_eval cannot be imported ({error}); install it with {INSTALL}") from error
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result alone
        manager, names = find_tasks(options, TaskManager)
        loaded = load_tasks(manager, names, online=online)
        manager.load = lambda _: loaded  # simple_evaluate would load them again
        model = open_for_harness(HFLM, folder, tokenizer, options, precision)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            log_samples=False,
        )
    # Through JSON once, so that what is written and what is returned are the same plain values.
    return json.loads(json.dumps(found, default=_plain))


def limit_chat_template(tokenizer: Tokenizer, name: str) -> None:
    """Let whoever asks `tokenizer` to render its chat template, which messages call `name`, do so within limits.

    Raises DataError where it is no template that can be limited.
    """
    check_template(own_template(tokenizer), name)
    render = tokenizer.apply_chat_template

    def limited(*arguments: Any, **options: Any) -> Any:
        try:
            rendered = within_limits(lambda: render(*arguments, **options))
            return check_length(rendered) if isinstance(rendered, str) else rendered
        except TemplateLimitError as error:
            raise TemplateLimitError(
                f"--apply_chat_template: {name}: {error}; leave it out, or use another template"
            ) from error

    tokenizer.apply_chat_template = limited


def find_tasks(options: HarnessOptions, manager_class: Any) -> tuple[Any, list[str]]:
    """A task manager that knows all tasks of `options`, and their names. Raises ConfigError naming those that no one knows.

    lm_eval's own fifteen thousand take it twenty seconds to look through: they are, where the user's do not suffice.
    """
    if options.tasks_folder is not None and not options.tasks_folder.is_dir():
        raise ConfigError(f"--harness_tasks: {options.tasks_folder} is no folder; give one that holds tasks as YAML files")
    folder = None if options.tasks_folder is None else str(options.tasks_folder)
    manager = manager_class(include_path=folder, include_defaults=False)
    own = manager.all_tasks
    of_others = {*manager.all_groups, *manager.all_tags}  # may name tasks of lm_eval's
    names, unknown = known_names(options.tasks, manager)
    if unknown or of_others & set(names):
        log.info("looking through the tasks that lm_eval brings")
        manager = manager_class(include_path=folder)
        names, unknown = known_names(options.tasks, manager)
    if unknown:
        problems = [_no_such_task(name, manager.all_tasks) for name in unknown]
        if folder is not None:
            problems.append(f"{folder} has {', '.join(own) or 'none'} (lm_eval passes over files that are no valid task)")
        raise ConfigError("--harness: " + "\n  ".join(problems))
    return manager, names


def known_names(wanted: tuple[str, ...], manager: Any) -> tuple[list[str], list[str]]:
    """What lm_eval calls the `wanted` tasks, and those of them that `manager` does not know."""
    names: list[str] = []
    unknown = []
    for name in wanted:
        is_file = name.endswith((".yaml", ".yml")) and Path(name).is_file()
        found = [name] if is_file or name in manager.all_tasks else manager.match_tasks([name])
        names += [one for one in found if one not in names]
        if not found:
            unknown.append(name)
    return names, unknown


def _no_such_task(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "`python -m lm_eval ls tasks` lists them;"
    return f"there is no task {name!r}; {hint} tasks of your own are found with --harness_tasks FOLDER"


def load_tasks(manager: Any, names: list[str], *, online: bool) -> Any:
    """The tasks with their data. Raises ConfigError where these cannot be had."""
    try:
        loaded = manager.load(names)
    except Exception as error:  # lm_eval and the data sets' library raise many kinds; each ends in one message
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        is_missing = isinstance(error, ConnectionError) or any(word in reason for word in ("Hub", "cache"))
        hint = OFFLINE if is_missing and not online else ""
        raise ConfigError(f"--harness: {', '.join(names)} cannot be loaded: {reason}{hint}") from error
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise ConfigError(
            f"--harness: {', '.join(unsafe)} would run code that the model writes, which is not done here; "
            "`python -m lm_eval --confirm_run_unsafe_code` does it, in a place where it can do no harm"
        )
    return loaded


def open_for_harness(
    model_class: Any, folder: Path, tokenizer: Tokenizer, options: HarnessOptions, precision: PrecisionConfig
) -> Any:
    """lm_eval's model of the Hugging Face folder `folder`, computing as `evaluate` does. Raises ConfigError.

    Before each text stands what did in training: what the tokenizer puts there, or else the EOS of the text before. A chat
    template writes the beginning of its texts itself.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prefix = text_prefix(tokenizer)
    # Opened here, as lm_eval would open pickles too.
    model = transformers_models.open_weights(folder).to(device).eval()
    try:
        opened = model_class(
            pretrained=model,
            tokenizer=tokenizer,
            mixed_precision_dtype=AUTOCAST[build_precision(precision, device).name],
            softmax_dtype="float32",
            batch_size=options.batch_size,
            prefix_token_id=prefix[-1] if prefix else tokenizer.eos_token_id,
            add_bos_token=bool(prefix) and not options.apply_chat_template,
        )
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--harness: lm_eval does not take the model in {folder}: {reason}") from error
    begin_whole_texts_once(opened)
    return opened


def begin_whole_texts_once(model: Any) -> None:
    """Where lm_eval measures whole texts, it puts the prefix before each itself: its tokens must not begin with another one."""
    measure = model.loglikelihood_rolling

    def measured(*arguments: Any, **options: Any) -> Any:
        before, model.add_bos_token = model.add_bos_token, False
        try:
            return measure(*arguments, **options)
        finally:
            model.add_bos_token = before

    model.loglikelihood_rolling = measured


def write_results(run: Path, folder: Path, results: Mapping[str, Any]) -> Path:
    """Keep `results` of the checkpoint `folder` in the run's folder; the file. Raises ConfigError where the disk refuses."""
    to = run / RESULTS_FOLDER
    file = to / f"{folder.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    if to.is_symlink():
        raise ConfigError(f"{to} is a symbolic link, and no link is followed inside a run's folder; remove it")
    try:
        to.mkdir(exist_ok=True)
        replace_file(file, [json.dumps(masked_within(results), indent=2, ensure_ascii=False).encode(), b"\n"], durable=False)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}); make room there") from error
    return file


def _plain(value: Any) -> Any:
    """JSON of what is none, as lm_eval writes it: numbers of numpy, sets, names of functions."""
    if hasattr(value, "item"):
        return value.item()
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
