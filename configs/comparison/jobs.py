"""Runs of a sweep as jobs of a cluster, through submitit (SWEEP_EXECUTOR).

https://github.com/facebookincubator/submitit
Everything that knows a cluster is submitit's. Here: what a job does, and how a sweep that was ended meets its jobs
again. The folder of the sweep must be one that the machines share.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from configs import handover
from configs.comparison.plan import Sweep
from configs.settings import ROOT, fail, say

CLUSTERS = {"slurm": "slurm", "submitit_local": "local"}  # SWEEP_EXECUTOR: submitit's name for it
POLL = 2.0  # seconds between two looks at the jobs


class Training:
    """One run. Where its time is up, it saves a checkpoint, and is submitted again to go on from there."""

    def __init__(self, words: list[str], output: str):
        self.words, self.output, self.child = words, output, None

    def __call__(self) -> int:
        Path(self.output).parent.mkdir(parents=True, exist_ok=True)
        with open(self.output, "a", encoding="utf-8") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            self.child = subprocess.Popen(self.words, **streams, env={**os.environ, "LANGUAGE": "en"})
            return self.child.wait()

    def checkpoint(self):
        """What submitit calls as the time runs out, or as another job takes the machine."""
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            self.child.terminate()  # the run saves a checkpoint
            self.child.wait()
        return DelayedSubmission(Training(self.words, self.output))


def options(text: str | None) -> dict:
    """SWEEP_JOB, `timeout_min=240,slurm_partition=gpu`, as submitit's parameters."""
    found = {}
    for part in (text or "").split(","):
        if part.strip():
            name, sign, value = part.partition("=")
            if not sign or not name.strip().isidentifier():
                fail(f"SWEEP_JOB {text!r}: {part!r} is not name=value, e.g. timeout_min=240,gpus_per_node=1")
            found[name.strip()] = int(value) if value.strip().lstrip("-").isdigit() else value.strip()
    return found


class Cluster:
    """Where jobs are submitted. kind: a key of CLUSTERS; parameters: as `options` gives them."""

    def __init__(self, kind: str, folder: Path, parameters: dict):
        if importlib.util.find_spec("submitit") is None:
            fail(f"SWEEP_EXECUTOR is {kind!r}, which needs the package submitit: pip install submitit")
        import submitit

        self.folder, self.kind = Path(folder).resolve() / "jobs", CLUSTERS[kind]
        self.job_class = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[self.kind]
        try:
            self.executor = submitit.AutoExecutor(self.folder, cluster=self.kind)
            self.executor.update_parameters(**{"timeout_min": 24 * 60, **parameters})
        except Exception as error:  # a wrong parameter, or no such cluster here; submitit has many kinds
            fail(f"SWEEP_EXECUTOR {kind!r} with SWEEP_JOB {parameters}: {' '.join(str(error).split())[:300]}")
        # a job unpickles Training, which it must find
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

    def done(self, sweep: Sweep, words: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
        """(key, exit code) of each run as its job ends. words: {key: command line behind the python}.

        A job that an earlier start has submitted, and that is not over, is waited for. Ctrl-C leaves the jobs alone.
        """
        jobs = {}
        for key, line in words.items():
            run = sweep.runs[key]
            job = self.job_class(self.folder, run["job"]) if run.get("job") else None
            if job is None or (self.code(job, run) is None and not self.at_work(job, run)):
                job = self.executor.submit(Training([sys.executable, *line], str(Path(run["folder"]) / "output.txt")))
                run["job"] = job.job_id
            jobs[key] = job
        sweep.save()
        say(f"{len(jobs)} jobs: {', '.join(job.job_id for job in jobs.values())}; their logs lie in {self.folder}")
        while jobs:
            for key, job in list(jobs.items()):
                code = self.code(job, sweep.runs[key])
                if code is None and not self.at_work(job, sweep.runs[key]):
                    code = 1  # it ended without a result: it was cancelled, or its machine went
                if code is not None:
                    del jobs[key], sweep.runs[key]["job"]
                    yield key, code
            time.sleep(POLL if jobs else 0)

    def code(self, job, run: dict) -> int | None:
        """The exit code of a job's run; None where there is none yet, or never will be."""
        if not job.paths.result_pickle.exists() or handover.is_locked(run["folder"]):
            return None
        try:
            return job.result()
        except Exception:  # the job's own error; its log has it
            return 1

    def at_work(self, job, run: dict) -> bool:
        """Whether a job is waiting, or running, or its run is at work somewhere."""
        return not job.done(force_check=True) or handover.is_locked(run["folder"])
