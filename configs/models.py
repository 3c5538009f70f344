"""Models that others made: what is in their folders is looked at before anything relies on it.

Weights are read from safetensors only, no model brings code of its own to run here, and a weight that is not there is
an error, where the library would take a random one. `mend`: what a user can do about it; None: take another model.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import find_adapter_config_file

from configs import device, hub
from configs.hub import Unfit
from configs.settings import fail, say

transformers.utils.logging.disable_progress_bar()  # "Loading weights", "Writing model shards"

POINTER = b"version https://git-lfs.github.com/spec/"  # what stands in a file that a clone without git-LFS left
READ = (".safetensors", ".json", ".model", ".txt", ".jinja")  # of a model's folder, nothing else is read
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")  # reading one can run code
OTHERS = ("*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "openvino/*")  # the same weights for other libraries
# Or the library asks a service of the Hub for safetensors where a repository has none, and takes what that has made.
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
# What must be a positive number; a list (one number a layer) is left to the library.
COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
COUNTS += ("head_dim", "vocab_size")
MOST_LAYERS = 10_000  # even without storage, so many modules take minutes


# --- errors


def named(name: str, flag: str) -> str:
    """A model in a sentence."""
    return f"model {name!r} ({flag})"


def or_another(mend: str | None, flag: str) -> str:
    """The end of a sentence: what a user can do."""
    return mend or f"get it anew, or name another one: --{flag.lower()} NAME"


@contextlib.contextmanager
def loading(what: str, mend: str) -> Iterator[None]:
    """Turn what the libraries raise for a damaged model into one sentence with its remedy, and exit code 2.

    They raise all kinds for files that are not what they seem, so all kinds are caught, but for the loss of another
    process. Nothing of ours belongs inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        fail(f"{what} does not fit into memory ({reason}); use --precision bf16, or a smaller model")
    except Exception as error:
        if device.lost_process(error):
            raise
        reason = " ".join((str(error) if type(error) is Unfit else f"{type(error).__name__}: {error}").split())
        fail(f"{what} cannot be loaded ({reason[:300].rstrip('.: ')}); {mend}")


# --- folders


def folder_problem(folder: Path) -> str:
    """What is wrong with the weights in a model's folder, seen from its files' names and headers; "" for nothing."""
    if pointers := pointers_in(folder):
        return (
            f"holds git-LFS pointers in place of files ({enumerated(pointers)}); fetch them with `git lfs pull` in "
            f"that folder, or download the model with: hf download OWNER/NAME --local-dir {folder}"
        )
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    shards = [single]
    if not single.is_file() and index.is_file():
        try:
            shards = [
                folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"has an {index.name} that cannot be read ({type(error).__name__}: {error})"
        if missing := [path.name for path in shards if not path.is_file()]:
            return f"lacks {len(missing)} of its {len(shards)} files of weights ({enumerated(missing)})"
    elif not single.is_file():
        if pickles := sorted(path.name for kind in PICKLES for path in folder.glob(kind)):
            return (
                f"holds its weights as pickles only ({enumerated(pickles)}), and reading a pickle can run code; have "
                "them converted to safetensors, e.g. at https://huggingface.co/spaces/safetensors/convert"
            )
        return "holds no weights (model.safetensors is missing)"
    for path in shards:
        try:
            with safe_open(path, framework="pt"):  # reads the header, which knows the file's length
                pass
        except Exception as error:  # the library's own kind, and those of the file system
            state = "empty" if path.stat().st_size == 0 else f"cut off or damaged ({error})"
            return f"holds {path.name}, which is {state}"
    return ""


def pointers_in(folder: Path) -> list[str]:
    """Names of the files that would be read here, and are git-LFS pointers."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.suffix in READ and path.is_file()):
        with contextlib.suppress(OSError):  # who may not read it is told so when it is loaded
            if path.stat().st_size < 1024 and path.read_bytes().startswith(POINTER):
                found.append(path.name)
    return found


def enumerated(names: list[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


# --- configurations


def configuration(
    name: str, revision: str | None, flag: str = "MODEL_NAME", mend: str | None = None, **changes
) -> PretrainedConfig:
    """A model's configuration, with nothing in it that could choose code to run. changes: e.g. num_labels=1.

    Raises: SystemExit(2) where it is no configuration, of a type that the library does not know, or impossible.
    """
    what, mend, path = named(name, flag), or_another(mend, flag), hub.model_path(name)
    if (folder := hub.local_path(name)) and "config.json" in pointers_in(folder):
        fail(f"{what} {folder_problem(folder)}; {mend}")
    with loading(what, mend), hub.hub_errors("model", name, flag, revision):
        raw, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    if not isinstance(raw, dict):
        fail(f"{what}: its config.json holds no object, but a {type(raw).__name__}; {mend}")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = "; the model brings code of its own for it, which is never run here" if raw.get("auto_map") else ""
        fail(
            f"{what} is of the type {kind!r} (model_type in its config.json), which transformers "
            f"{transformers.__version__} does not know{own}; {mend}"
        )
    with loading(what, mend), hub.hub_errors("model", name, flag, revision):
        config = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=hub.TRUST_REMOTE_CODE, **changes
        )
    text = config.get_text_config()
    for key in COUNTS:
        value = getattr(text, key, None)
        if isinstance(value, (int, float, str)) and not (type(value) is int and value > 0):
            fail(f"{what}: {key} is {value!r} in its config.json, and must be a positive number; {mend}")
    if getattr(text, "num_hidden_layers", 0) > MOST_LAYERS:
        fail(f"{what}: num_hidden_layers is {text.num_hidden_layers:,} in its config.json; {mend}")
    if config.dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        # what is trained is saved in it, and others cannot hold weights as they are
        fail(f"{what}: dtype is {str(config.dtype).removeprefix('torch.')} in its config.json; {mend}")
    # a repository's name here would fetch a kernel from the Hub and run it; None is sdpa, or eager where that is not
    config._attn_implementation = config._experts_implementation = None
    if str(getattr(config, "transformers_weights", None) or ".safetensors").endswith(".bin"):
        fail(f"{what}: its config.json names a pickle as its weights, and reading a pickle can run code; {mend}")
    return config


def check(name: str, config: PretrainedConfig, weights: bool = True, flag: str = "MODEL_NAME") -> None:
    """Build a causal language model without storage, and match a local folder's weights with it by name and shape.

    weights: whether to look at the weights, too. Those of a model on the Hub are looked at when they are loaded.
    Raises: SystemExit(2) where the model cannot be built, or weights are missing.
    """
    what, mend, folder = named(name, flag), or_another(None, flag), hub.local_path(name)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        fail(f"{what} is no causal language model, but of the type {config.model_type!r}; {mend}")
    if getattr(config, "is_decoder", None) is False and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        fail(
            f"{what} is no causal language model: the type {config.model_type!r} fills in words, and sees what comes "
            f"behind them (is_decoder is false in its config.json); {mend}"
        )
    if folder and weights:
        if problem := folder_problem(folder):
            fail(f"{what} {problem}; {mend}")
        rehearse(AutoModelForCausalLM, name, None, config, flag, mend)
    else:
        with loading(what, mend), init_empty_weights(include_buffers=True):
            AutoModelForCausalLM.from_config(config, trust_remote_code=hub.TRUST_REMOTE_CODE)


# --- weights


def load(
    kind: type,
    name: str,
    revision: str | None,
    flag: str = "MODEL_NAME",
    mend: str | None = None,
    config: PretrainedConfig | None = None,
    **how,
) -> PreTrainedModel:
    """A model with its weights. kind: AutoModelForCausalLM, ...; how: what from_pretrained is given (dtype, ...).

    config: as `configuration` reads it, None: read it. Under ZeRO-3, call it in every process.
    Raises: SystemExit(2) where the model cannot be had, is damaged, or lacks a weight.
    """
    what, mend = named(name, flag), or_another(mend, flag)
    if (folder := hub.local_path(name)) and (problem := folder_problem(folder)):
        fail(f"{what} {problem}; {mend}")
    config = config or configuration(name, revision, flag, mend)
    if how.get("quantization_config") is not None:  # a weight of a wrong shape is not noticed where it is quantised
        rehearse(kind, name, revision, config, flag, mend)
    with loading(what, mend), hub.hub_errors("model", name, flag, revision):
        model, found = _from_pretrained(kind, name, revision, config, **how)
    refuse_gaps(found, what, mend)
    if unused := sorted(found["unexpected_keys"]):
        say(f"note: {what} has weights that the model does not use, {len(unused)} of them ({enumerated(unused)})")
    check_generation(model, what)
    return model


def check_generation(model: PreTrainedModel, what: str) -> None:
    """Replace generation settings that contradict themselves: the library would refuse to save them, after training.

    Published ones do, such as a temperature beside do_sample false. The token ids in them are kept.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except Exception as error:  # a value of a wrong type raises what it will
        reason = " ".join(str(error).split())[:150]
        say(f"note: {what}: its generation_config.json contradicts itself, so only its token ids are kept ({reason})")
        kept = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**kept)


def rehearse(kind: type, name: str, revision: str | None, config: PretrainedConfig, flag: str, mend: str) -> None:
    """Match the weights of a model with its configuration by name and shape, from their headers, without storage."""
    if getattr(config, "quantization_config", None) is not None:
        return  # weights that are quantised already have shapes of their own
    what = named(name, flag)
    with loading(what, mend), hub.hub_errors("model", name, flag, revision):
        _, found = _from_pretrained(kind, name, revision, config, device_map="meta")
    refuse_gaps(found, what, mend)


def _from_pretrained(kind: type, name: str, revision: str | None, config: PretrainedConfig, **how) -> tuple:
    """(model, which weights were found and which were not). The library's own table of them is not printed."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_no_table(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    if find_adapter_config_file(hub.model_path(name), revision=revision):  # the library would take its base instead
        raise Unfit("it is an adapter, or holds one, adapter_config.json; merge it, or name its base")
    log.addFilter(is_no_table)
    try:
        return kind.from_pretrained(
            hub.model_path(name),
            revision=revision,
            config=config,
            trust_remote_code=hub.TRUST_REMOTE_CODE,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **how,
        )
    except OSError as error:
        if "use_safetensors" not in str(error):
            raise
        raise Unfit(
            "it has no safetensors; where it has pickles, pytorch_model.bin, reading them can run code: have them "
            "converted, e.g. at https://huggingface.co/spaces/safetensors/convert"
        ) from None
    finally:
        log.removeFilter(is_no_table)


def refuse_gaps(found: dict, what: str, mend: str) -> None:
    """Exit code 2 where weights are missing or have another shape; the library would train random ones in their place.

    found: what from_pretrained reports. A tied weight that another one supplies is not missing there.
    """
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        instead = f", and holds {len(unused)} others ({enumerated(unused)})" if unused else ""
        fail(
            f"{what} lacks {len(missing)} of the weights that its config.json asks for ({enumerated(missing)})"
            f"{instead}; random ones would take their place; {mend}"
        )
    for key, shape, wanted in sorted(found["mismatched_keys"]):
        fail(f"{what}: {key} has the shape {tuple(shape)}, and its config.json asks for {tuple(wanted)}; {mend}")


def load_adapter(model: PreTrainedModel, folder: str, mend: str) -> PeftModel:
    """The model with LoRA's adapter of a folder over it; exit code 2 where it is damaged or lacks a weight."""
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():  # PEFT would look for a pickle
        fail(f"{folder} holds no {file.name}; {mend}")
    with loading(folder, mend):
        adapted = PeftModel.from_pretrained(model, folder)
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        with safe_open(file, framework="pt") as opened:
            missing = sorted(wanted - set(opened.keys()))
    if missing:
        fail(f"{folder} lacks {len(missing)} of the adapter's {len(wanted)} weights ({enumerated(missing)}); {mend}")
    return adapted


# --- tokenizers and embeddings


def load_tokenizer(name: str, revision: str | None, flag: str = "MODEL_NAME", mend: str | None = None):
    """A model's tokenizer; exit code 2 where it is missing, damaged, or another model's."""
    what, mend, folder = named(name, flag), or_another(mend, flag), hub.local_path(name)
    path = hub.model_path(name)
    if folder and pointers_in(folder):
        fail(f"{what} {folder_problem(folder)}; {mend}")
    with loading(f"the tokenizer of {what}", mend), hub.hub_errors("model", name, flag, revision):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=hub.TRUST_REMOTE_CODE)
        if tokenizer.eos_token is None:
            fail(f"model {name!r} has no end-of-text token (eos_token), so an answer could not end; use another model")
        ids = tokenizer("What is an ETF?", add_special_tokens=False).input_ids
        # the base alone: a token that was added later, which no row may contain, can lie behind the embedding
        highest = max(tokenizer.vocab_size - 1, tokenizer.eos_token_id)
    if not ids or set(ids) == {tokenizer.unk_token_id}:
        fail(f"model {name!r} has no tokenizer that can be used (is tokenizer.json missing?); save one with it")
    rows = vocabulary(path, revision)
    if rows is not None and highest >= rows:
        fail(
            f"the tokenizer of {what} is another model's: it makes token ids up to {highest}, and the model has "
            f"{rows} (vocab_size in its config.json); {mend}"
        )
    return tokenizer


def vocabulary(path: str, revision: str | None) -> int | None:
    """How many token ids a model knows, as its config.json says; None where it says nothing (an adapter has none)."""
    try:
        raw, _ = PretrainedConfig.get_config_dict(path, revision=revision)
        size = raw.get("vocab_size", (raw.get("text_config") or {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return None
    return size if type(size) is int else None


def load_embedder(name: str, where: str):
    """A sentence-transformers model, from safetensors; exit code 2 where it cannot be had, or is pickled."""
    from huggingface_hub import snapshot_download
    from sentence_transformers import SentenceTransformer

    flag = "EMBEDDING_MODEL"
    what, mend, folder = named(name, flag), or_another(None, flag), hub.local_path(name)
    with loading(what, mend), hub.hub_errors("model", name, flag):
        if folder is None:  # the library reads a pickle where it finds one: so it finds none
            repository = name if "/" in name else f"sentence-transformers/{name}"  # as the library completes it
            folder = Path(snapshot_download(repository, ignore_patterns=[*PICKLES, *OTHERS]))
    for part in sorted({path.parent for kind in PICKLES for path in folder.rglob(kind)}):
        if not list(part.glob("*.safetensors")):
            fail(
                f"{what} holds pickles without safetensors beside them ({part}), and reading one can run code; {mend}"
            )
    with loading(what, mend):
        return SentenceTransformer(
            str(folder),
            device=where,
            trust_remote_code=hub.TRUST_REMOTE_CODE,
            model_kwargs={"use_safetensors": True, "attn_implementation": None},
        )
