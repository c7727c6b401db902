"""Evaluating a finished model: its loss on validation data, on any number of ranks; or the tasks of EleutherAI's
lm-evaluation-harness (the package lm_eval, the extra `harness`).

A checkpoint is a Hugging Face folder, so lm_eval's own model class runs it, and the numbers are comparable to published ones.
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

from dist_trainer.config.command_line import command_path
from dist_trainer.config.paths import is_run_folder
from dist_trainer.config.schema import PrecisionConfig, TrainingConfig
from dist_trainer.config.secrets import masked_within
from dist_trainer.data.chat import TemplateLimitError, check_length, check_template, default_chat_template, within_limits
from dist_trainer.data.loader import create_validation_loader
from dist_trainer.data.token_bytes import build_token_bytes
from dist_trainer.data.tokenizers import Tokenizer, configured_tokenizer, load_tokenizer, text_prefix, vocabulary_size
from dist_trainer.distributed.collectives import local_rank0_first
from dist_trainer.distributed.context import init_distributed
from dist_trainer.errors import ConfigError
from dist_trainer.huggingface import transformers_models
from dist_trainer.huggingface.hub import is_hub_reachable
from dist_trainer.huggingface.model_files import find_model, find_valid_model, model_folder
from dist_trainer.models.loss import model_loss
from dist_trainer.models.registry import check_model_fits
from dist_trainer.models.weights import open_model
from dist_trainer.parallel.cpu.memory import keep_freed_memory
from dist_trainer.storage.files import replace_file
from dist_trainer.tracking.run_log import configure_logging
from dist_trainer.tracking.run_reader import run_folder_of
from dist_trainer.training.precision import build_precision, warn_of_emulated_bf16
from dist_trainer.training.validation import evaluate

log = logging.getLogger(__name__)

RESULTS_FOLDER = "evaluations"
"""Subfolder of a run's folder."""
INSTALL = f"`EXTRAS=harness launch/setup.sh`, or `{command_path()} -m pip install lm_eval accelerate`"
OFFLINE = (
    ". The Hub cannot be reached: download the task's data into the local cache (HF_HOME) on a machine with network access, or "
    "name tasks whose data are in local files (--harness_tasks)"
)
AUTOCAST = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}
"""lm_eval's names for number formats."""


def evaluate_model(path: Path, config: TrainingConfig, option_names: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Loss, perplexity, bits per byte and number of tokens for the model at `path` (or with that name on the Hub), on rank 0.

    `option_names`: the command-line options from which keys were derived; messages name the option. Raises DistTrainerError,
    the same one on every rank.
    """
    names = option_names or {}
    with init_distributed(config.distributed) as world:
        configure_logging(None, rank=world.rank)
        if world.device.type == "cpu":
            keep_freed_memory()
        # Before the data, which may take long. So far, only config.json of a Hub model has been downloaded.
        folder = local_rank0_first(world, lambda: model_folder(str(path), weights=True, key="RUN"))
        find_model(folder)
        tokenizer_key = names.get("data.tokenizer", "data.tokenizer")
        tokenizer = local_rank0_first(world, lambda: configured_tokenizer(config.data, key=tokenizer_key))
        data_key = names.get("data.validation_dataset", "data.validation_dataset")
        loader = create_validation_loader(config, world, tokenizer=tokenizer, key=data_key)
        model = open_model(folder, device=world.device)
        check_model_fits(model, vocabulary_size(tokenizer), config.data.sequence_length, name=f"{path}: the model")
        precision = build_precision(config.precision, world.device)
        if world.is_main:
            warn_of_emulated_bf16(precision, world.device)
        result = evaluate(
            model.eval(),
            loader,
            num_blocks=loader.sampler.num_blocks,  # type: ignore[attr-defined]
            world=world,
            precision=precision,
            loss_function=model_loss,
            token_bytes=build_token_bytes(tokenizer),
        )
        if not world.is_main or result is None:
            return None
        if result.bytes is None:
            log.info("bits per byte are null: this tokenizer's tokens do not decode to exactly the text that they encode")
        return {"data": config.data.validation_dataset or config.data.dataset, **result.metrics()}


# ----------------------------------------------------------------------------------------------------- lm_eval


@dataclass(frozen=True)
class HarnessOptions:
    """The options of lm_eval that `evaluate` passes on."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags, patterns of names, or paths of YAML files."""
    tasks_folder: Path | None = None
    """Folder with the user's tasks, YAML files at any depth."""
    num_fewshot: int | None = None
    """Few-shot examples before each question; None: the task's default."""
    limit: int | None = None
    """Questions per task; None: all."""
    batch_size: int = 8
    """Texts per batch."""
    apply_chat_template: bool = False
    """Whether to ask questions as chat messages."""


def evaluate_tasks(path: Path, options: HarnessOptions, precision: PrecisionConfig) -> dict[str, Any]:
    """lm_eval's results by task and metric for the model at `path` (or with that name on the Hub), and the file in the run's
    folder with everything that lm_eval reports (None: the model is not in a run). Raises DistTrainerError.
    """
    configure_logging(None, rank=0)
    model = model_folder(str(path), weights=True, key="RUN")
    results = run_harness(model, options, precision)
    folder = find_valid_model(model).resolve()
    run = run_folder_of(model, is_run=is_run_folder)
    file = None if run is None else str(write_results(run, folder, results))
    return {"model": str(folder), "results": results["results"], "file": file}


def run_harness(path: Path, options: HarnessOptions, precision: PrecisionConfig) -> dict[str, Any]:
    """What lm_eval's `simple_evaluate` returns for the model at `path`: `results` by task and metric, and their settings.

    Raises ConfigError if lm_eval is not installed or does not accept a task or the model; CheckpointError, DataError.
    """
    folder = find_valid_model(path)
    tokenizer = load_tokenizer(str(path), key="RUN")
    if options.apply_chat_template:
        if not tokenizer.chat_template:
            raise ConfigError(f"--apply_chat_template: the tokenizer in {folder} has none; leave it out")
        limit_chat_template(tokenizer, f"the chat template of {folder}")
    online = is_hub_reachable()  # before the import: `datasets` reads HF_HUB_OFFLINE once
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"--harness: lm_eval cannot be imported ({error}); install it with {INSTALL}") from error
    with contextlib.redirect_stdout(sys.stderr):  # standard output is only for the result
        manager = TaskManager(include_path=None if options.tasks_folder is None else str(options.tasks_folder))
        names = find_tasks(options.tasks, manager)
        try:
            results = lm_eval.simple_evaluate(
                model=open_for_harness(HFLM, folder, tokenizer, options, precision),
                tasks=names,
                task_manager=manager,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                apply_chat_template=options.apply_chat_template,
                log_samples=False,
            )
        except (ImportError, KeyError, OSError, ValueError) as error:  # what lm_eval and `datasets` raise for bad tasks
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            is_missing = isinstance(error, ConnectionError) or "Hub" in reason or "cache" in reason
            hint = OFFLINE if is_missing and not online else ""
            raise ConfigError(f"--harness: lm_eval cannot evaluate {', '.join(names)}: {reason}{hint}") from error
    # A round trip through JSON, so that the values returned equal those written.
    return json.loads(json.dumps(results, default=_as_json))


def limit_chat_template(tokenizer: Tokenizer, name: str) -> None:
    """Limit the time and memory that `tokenizer` may use to render its chat template; messages call it `name`.

    Raises DataError if the template cannot be limited.
    """
    check_template(default_chat_template(tokenizer), name)
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


def find_tasks(patterns: tuple[str, ...], manager: Any) -> list[str]:
    """The tasks of `manager` that match `patterns`. Raises ConfigError naming each pattern without a match."""
    names: list[str] = []
    unknown = []
    for pattern in patterns:
        is_file = pattern.endswith((".yaml", ".yml")) and Path(pattern).is_file()
        matches = [pattern] if is_file or pattern in manager.all_tasks else manager.match_tasks([pattern])
        names += [name for name in matches if name not in names]
        if not matches:
            near = difflib.get_close_matches(pattern, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "`python -m lm_eval ls tasks` lists them;"
            unknown.append(f"unknown task {pattern!r}; {hint} --harness_tasks FOLDER adds your own")
    if unknown:
        raise ConfigError("--harness: " + "\n  ".join(unknown))
    return names


def open_for_harness(
    model_class: Any, folder: Path, tokenizer: Tokenizer, options: HarnessOptions, precision: PrecisionConfig
) -> Any:
    """lm_eval's HFLM (`model_class`) with the model in `folder`, computing as `evaluate` does.

    Each text has the same prefix as in training: the tokenizer's, or else the EOS of the previous text. A chat template writes
    its own prefix.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prefix = text_prefix(tokenizer)
    model = model_class(
        # loaded here because lm_eval would also load pickles
        pretrained=transformers_models.load_model(folder).to(device).eval(),
        tokenizer=tokenizer,
        mixed_precision_dtype=AUTOCAST[build_precision(precision, device).name],
        softmax_dtype="float32",
        batch_size=options.batch_size,
        prefix_token_id=prefix[-1] if prefix else tokenizer.eos_token_id,
        add_bos_token=bool(prefix) and not options.apply_chat_template,
    )
    measure = model.loglikelihood_rolling

    def measure_without_bos(*arguments: Any, **options: Any) -> Any:
        # lm_eval puts the prefix before rolling windows itself, and must not add a second one.
        before, model.add_bos_token = model.add_bos_token, False
        try:
            return measure(*arguments, **options)
        finally:
            model.add_bos_token = before

    model.loglikelihood_rolling = measure_without_bos
    return model


def write_results(run: Path, folder: Path, results: Mapping[str, Any]) -> Path:
    """Write `results` of the checkpoint `folder` into the run's folder; returns the file. Raises ConfigError if that fails."""
    to = run / RESULTS_FOLDER
    file = to / f"{folder.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    if to.is_symlink():
        raise ConfigError(f"{to} is a symbolic link, and links inside a run's folder are not followed; remove it")
    try:
        to.mkdir(exist_ok=True)
        replace_file(file, [json.dumps(masked_within(results), indent=2, ensure_ascii=False).encode(), b"\n"], durable=False)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}); free some space") from error
    return file


def _as_json(value: Any) -> Any:
    """Convert values that are not JSON, as lm_eval does: numpy numbers, sets, functions."""
    if hasattr(value, "item"):
        return value.item()
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
