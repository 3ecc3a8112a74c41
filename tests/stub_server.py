"""A stand-in on this machine for the part of W&B's service that its client talks to; keeps what arrives."""

import gzip
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


class Run:
    """What the service knows of a run: rows of its history by place, settings, summary and how it ended."""

    def __init__(self) -> None:
        self.started: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.history: dict[int, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None


class Stub:
    """`runs` by id, contents of `files` by name, `artifacts` by name with their aliases; grid sweeps."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.runs: dict[str, Run] = {}
        self.files: dict[str, bytes] = {}
        self.artifacts: dict[str, list[str]] = {}
        self.views: list[dict[str, Any]] = []
        self.sweep: dict[str, Any] = {}
        self.todo: list[dict[str, Any]] = []

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """What the service answers to an operation of GraphQL; None for one that this one does not know."""
        reply = getattr(self, operation, None)
        return None if reply is None else reply(given)

    def upload(self, name: str) -> dict[str, Any]:
        return {"name": name, "displayName": name, "uploadHeaders": [], "uploadUrl": f"{self.url}/upload/{name}"}

    def Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def project(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"id": "2", "name": given["project"], "entity": {"id": "1", "name": "me"}}

    def UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run())
        run.started |= {key: value for key, value in given.items() if value is not None}
        run.config |= {key: each["value"] for key, each in json.loads(given.get("config") or "{}").items()}
        bucket = {"id": name, "name": name, "displayName": given.get("displayName"), "config": "{}"}
        bucket |= {"sweepName": given.get("sweep"), "historyLineCount": len(run.history)}
        return {"upsertBucket": {"bucket": bucket | {"project": self.project(given)}, "inserted": inserted}}

    def RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        if run is None:
            return {"model": None}
        last = json.dumps([json.dumps(run.history[max(run.history)])]) if run.history else "[]"
        bucket = {"id": given["name"], "name": given["name"], "displayName": run.started.get("displayName")}
        bucket |= {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0, "tags": []}
        bucket |= {"historyTail": last, "eventsTail": "[]", "wandbConfig": "{}"}
        bucket |= {"summaryMetrics": json.dumps(run.summary)}
        bucket |= {"config": json.dumps({key: {"value": value} for key, value in run.config.items()})}
        return {"model": self.project(given) | {"bucket": bucket}}

    def CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        uploads = [self.upload(name) for name in given["files"]]
        return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": uploads}}

    def CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        asked = given["input"]
        self.artifacts[asked["artifactCollectionName"]] = [each["alias"] for each in asked["aliases"]]
        sequence = {"id": "5", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": "4", "state": "PENDING", "artifactSequence": sequence}}}

    def CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        manifest = {"id": "6", "file": {"id": "7"} | self.upload("manifest")}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        named = (given.get("input") or given)["artifactFiles"]
        extra = {"id": "8", "uploadMultipartUrls": None, "artifact": {"id": "4"}}
        nodes = [{"node": self.upload(each["name"]) | extra | {"storagePath": each["name"]}} for each in named]
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def CommitArtifact(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": "4", "digest": "d"}}}

    def UpsertSweep(self, given: dict[str, Any]) -> dict[str, Any]:
        self.sweep = yaml.safe_load(given["config"])
        values = {name: each["values"] for name, each in self.sweep["parameters"].items()}
        self.todo = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
        project = self.project({"project": self.sweep["project"]})
        return {"upsertSweep": {"sweep": {"name": "grid", "project": project}, "configValidationWarnings": []}}

    def SweepWithRuns(self, _: dict[str, Any]) -> dict[str, Any]:
        keys = ["displayName", "description", "priorRunsFilters", "runCountExpected", "controller", "scheduler"]
        found = dict.fromkeys([*keys, "updatedAt", "bestLoss"]) | {"id": "9", "name": "grid", "method": "grid"}
        found |= {"state": "RUNNING", "config": yaml.safe_dump(self.sweep)}
        found |= dict.fromkeys(["createdAt", "heartbeatAt"], "2026-01-01T00:00:00")
        return {"project": {"sweep": found | {"runs": {"edges": [], "pageInfo": {"hasNextPage": False}}}}}

    def CreateAgent(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "10"}}}

    def Heartbeat(self, given: dict[str, Any]) -> dict[str, Any]:
        commands: list[dict[str, Any]] = []
        if not json.loads(given.get("runState") or "{}"):
            commands = [{"type": "exit"}]
            if self.todo:
                point = {name: {"value": value} for name, value in self.todo.pop(0).items()}
                name = f"agent{len(self.todo)}"
                commands = [{"type": "run", "run_id": name, "program": self.sweep["program"], "args": point}]
        return {"agentHeartbeat": {"agent": {"id": "10"}, "commands": json.dumps(commands)}}

    def UpsertView2(self, given: dict[str, Any]) -> dict[str, Any]:
        self.views.append(given)
        return {"upsertView": {"view": {"id": "11", "name": given["name"]}, "inserted": True}}

    def stream(self, path: str, content: dict[str, Any]) -> None:
        """Rows of a run's history, each at its place, its summary, and the code that it ended with."""
        run = self.runs[path.split("/")[-2]]
        files = content.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for place, row in enumerate(history["content"], history["offset"]):
            run.history[place] = json.loads(row)
        for row in files.get("wandb-summary.json", {"content": []})["content"]:
            run.summary = json.loads(row)
        if content.get("complete"):
            run.exit_code = content["exitcode"]


@contextmanager
def serving() -> Iterator[Stub]:
    """The service, for as long as the block lasts."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # a run uploads many pictures at once

        def handle_error(self, *_: Any) -> None:
            """Clients end without closing their connections."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            return gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body

        def do_POST(self) -> None:
            body = self.body()
            if self.path.endswith("/graphql"):
                asked = json.loads(body)
                name = asked.get("operationName") or asked["query"].split("(")[0].split("{")[0].split()[-1]
                found = stub.answer(name, asked.get("variables") or {})
                return self.reply({"errors": [{"message": f"no {name}"}]} if found is None else {"data": found})
            if self.path.endswith("/file_stream"):
                stub.stream(self.path, json.loads(body))
            self.reply({})

        def do_PUT(self) -> None:
            stub.files[self.path.removeprefix("/upload/")] = self.body()
            self.reply({})

        def do_GET(self) -> None:
            self.reply({})

        def log_message(self, *_: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        stub = Stub(server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield stub
        finally:
            server.shutdown()
