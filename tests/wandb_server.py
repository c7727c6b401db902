"""A stand-in for W&B's server: answers what the real `wandb` and its wandb-core ask, and keeps what they send."""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4
ENTITY = "us"
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


@dataclass
class SentRun:
    """What the server has of one run."""

    project: str
    upserts: list[dict[str, Any]] = field(default_factory=list)
    """Variables of each `UpsertBucket`, in order."""
    starts: int = 0
    """How often it was opened: a client asks what the server has of a run before it resumes it."""
    streams: dict[str, list[str]] = field(default_factory=dict)
    """Lines of each file that is streamed. A chunk replaces everything from its offset on, as W&B's own server does."""
    overwritten: list[tuple[str, int]] = field(default_factory=list)
    """File and offset of each line of history that a later chunk replaced by another one."""
    gaps: list[tuple[str, int]] = field(default_factory=list)
    """File and offset of each chunk that began after the end."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Those that were uploaded."""
    exit_codes: list[int] = field(default_factory=list)
    preempting: bool = False
    artifacts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.streams.get(HISTORY, [])]

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.streams[SUMMARY][-1]) if SUMMARY in self.streams else {}

    @property
    def config(self) -> dict[str, Any]:
        newest = next(upsert["config"] for upsert in reversed(self.upserts) if upsert.get("config"))
        return {key: entry["value"] for key, entry in json.loads(newest).items()}

    def take(self, name: str, chunk: dict[str, Any]) -> None:
        """A piece of a stream."""
        lines, offset = self.streams.setdefault(name, []), chunk["offset"]
        if name == SUMMARY:
            lines[:] = chunk["content"]
            return
        if offset > len(lines):
            self.gaps.append((name, offset))
            lines += ["{}"] * (offset - len(lines))
        for number, line in enumerate(chunk["content"], start=offset):
            if number < len(lines) and lines[number] != line:
                self.overwritten.append((name, number))
            lines[number : number + 1] = [line]


class WandbServer:
    """Listens on a port of this machine's own; a context."""

    def __init__(self) -> None:
        self.runs: dict[str, SentRun] = {}
        self.operations: list[str] = []
        """What was asked of GraphQL, by name."""
        self.status_of: Callable[[str], int] = lambda path: 200
        """What a request to this path is answered with: 401 to all where the key is refused, 500 where it is broken."""
        self.may_answer = threading.Event()
        """Cleared: takes requests, and does not answer them."""
        self.may_answer.set()
        self.lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), type("Bound", (_Handler,), {"stand_in": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs to find this server, and nothing of the user's own."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.may_answer.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The data of GraphQL's answer. What is not known here is answered with nothing, as older servers do."""
        known: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "Viewer": self._viewer,
            "RunResumeStatus": self._resume_status,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._create_run_files,
            "CreateArtifact": self._create_artifact,
            "CreateArtifactManifest": self._create_manifest,
            "ArtifactType": lambda asked: {"project": {"artifact": None}},
            "CommitArtifact": lambda asked: {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "d"}}},
        }
        self.operations.append(operation)
        return known.get(operation, lambda asked: {})(asked)

    def _viewer(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {
            "viewer": {"id": "VQ==", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
        }

    def _resume_status(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(asked["name"])
        if run is None:
            return {"model": None}
        run.starts += 1
        bucket = {
            "id": asked["name"],
            "name": asked["name"],
            "displayName": run.upserts[0]["displayName"],
            "summaryMetrics": json.dumps(run.summary),
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "tags": run.upserts[0]["tags"],
            "notes": None,
            # Without it wandb-core takes the run for one that a sweep made and that never began, and resumes nothing.
            "wandbConfig": json.dumps({"t": run.config["_wandb"]["t"]}),
            "logLineCount": len(run.streams.get("output.log", [])),
        }
        for word, name in (("history", HISTORY), ("events", "wandb-events.jsonl")):
            lines = run.streams.get(name, [])
            bucket |= {f"{word}LineCount": len(lines), f"{word}Tail": json.dumps(lines[-1:])}
        return {"model": {"id": "m", "name": run.project, "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}}

    def _upsert(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = asked["name"] or asked["id"]
        is_new = name not in self.runs
        run = self.runs.setdefault(name, SentRun(asked["project"], starts=1))
        run.upserts.append(asked)
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}}
        first = run.upserts[0]
        bucket = {"id": name, "name": name, "displayName": first["displayName"], "description": "", "sweepName": None}
        bucket |= {"config": asked["config"], "project": project, "historyLineCount": len(run.streams.get(HISTORY, []))}
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _create_run_files(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{asked['run']}/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def _create_artifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answer that the server has it already, so that its files need not be sent."""
        given = asked["input"]
        self.runs[given["runName"]].artifacts.append(given)
        artifact = {"id": given["digest"], "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _create_manifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f", "name": asked["name"], "displayName": "", "uploadUrl": f"{self.url}/unasked", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """A request of file_stream."""
        run = self.runs[name]
        for file, chunk in (sent.get("files") or {}).items():
            run.take(file, chunk)
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, as wandb-core does at its end, is nothing to report."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    stand_in: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        server = self.stand_in
        server.may_answer.wait()
        if (status := server.status_of(self.path)) != 200:
            return self._say(status, {"errors": [{"message": "not today"}]})
        with server.lock:
            self._say(200, self._answer(body))

    do_GET = do_PUT = do_POST

    def _answer(self, body: bytes) -> dict[str, Any]:
        server = self.stand_in
        if self.path == "/graphql":
            asked = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            return {"data": server.answer(operation[1] if operation else "", asked.get("variables") or {})}
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            server.stream(match[1], json.loads(body))
        elif match := re.fullmatch(r"/upload/([^/]+)/(.*)", self.path):
            server.runs[match[1]].files[match[2]] = body
        return {}

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
