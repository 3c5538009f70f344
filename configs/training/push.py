"""PUSH_TO_HUB: the final adapter or model goes to the Hub, with a card that loads it from there."""

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from configs import hub
from configs.secrets import redact
from configs.settings import fail, first_on_machine, say
from configs.state import final_folder
from configs.training import runlog
from configs.training.export import model_card
from configs.training.runlog import RunLog
from configs.training.trainer import ExactTrainer


def refusals(name: str) -> list[str]:
    """Why the Hub would refuse an upload to `name` (owner/name), asked before the training: [] or one sentence."""
    if not first_on_machine():
        return []
    try:
        user = HfApi().whoami()
    except Exception as error:  # no connection, a proxy's page, or a token that is none
        return [f"PUSH_TO_HUB is {name!r}, and {_reason(error)}; train without it: --push_to_hub none"]
    known, owner = [user["name"], *(one["name"] for one in user.get("orgs", []))], name.partition("/")[0]
    if owner.lower() not in [one.lower() for one in known]:
        there = f"--push_to_hub {user['name']}/{name.partition('/')[2]}"
        return [f"PUSH_TO_HUB is {name!r}, but the token is of {user['name']!r}, who is not in {owner!r}: {there}"]
    return []


def finish(trainer: ExactTrainer, log: RunLog) -> None:
    """After training: upload what PUSH_TO_HUB asks for, then write the log's last state and say the last line."""
    if log.head["settings"]["PUSH_TO_HUB"] and trainer.is_world_process_zero():
        push_to_hub(trainer, log)
    runlog.finish(trainer, log)


def push_to_hub(trainer: ExactTrainer, log: RunLog) -> None:
    """Upload the final folder as PUSH_TO_HUB in one commit, and note in the log where it lies.

    A repository that is not there yet is made, and is private. A path of this machine goes into no file.
    Raises: SystemExit(2) where the Hub refuses it; the model lies in OUTPUT_DIR all the same, and the log says so.
    """
    settings, method = log.head["settings"], log.head["method"]
    name, folder = settings["PUSH_TO_HUB"], Path(settings["OUTPUT_DIR"]) / final_folder(method)
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        card = model_card(trainer, log, folder.name, name, _licence(api, log.head["model_name"]))
        changed = {"README.md": card.encode()}
        if method == "lora" and hub.local_path(log.head["model_name"]) is not None:
            config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
            config["base_model_name_or_path"] = Path(config["base_model_name_or_path"]).name
            changed["adapter_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        paths = [path for path in sorted(folder.iterdir()) if path.is_file()]
        parts = [CommitOperationAdd(path.name, changed.get(path.name, str(path))) for path in paths]
        api.create_commit(name, parts, commit_message=f"{folder.name}, {trainer.state.global_step} steps")
    except Exception as error:  # of the network, or of a token that may read only
        log.write(trainer.state, "done")
        again = f"hf upload {name} {folder}"
        fail(f"{folder} is done, but {name} (PUSH_TO_HUB) did not get it: {_reason(error)}; upload it with: {again}")
    log.head["pushed"] = {name: f"{hub.endpoint()}/{name}"}
    private = " (private: open it in its settings there)" if api.model_info(name).private else ""
    say(f"uploaded: {hub.endpoint()}/{name}{private}", always=True)


def _licence(api: HfApi, base: str) -> str:
    """The licence that the base model's card on the Hub names; "" where there is none."""
    if not hub.is_hub_name(base):
        return ""
    try:
        card = api.model_info(base).card_data
    except (RepositoryNotFoundError, HfHubHTTPError):
        return ""
    found = card.get("license") if card else None
    return found if isinstance(found, str) else ""


def _reason(error: Exception) -> str:
    """An error of the Hub in a few words, without a token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"{hub.endpoint()} does not accept the token (HTTP 401); run `hf auth login`"
    if status == 403:
        return "the token may not write there (HTTP 403); make one with write access and run `hf auth login`"
    return redact(" ".join(str(error).split())[:200]) or type(error).__name__
