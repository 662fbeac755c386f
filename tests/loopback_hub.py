"""A Hub on this machine: what the client of huggingface_hub needs to create, upload, list and download models.

Run as a script it serves until it is killed and prints its address. Repositories live in memory. `breaks` makes
commits break off in the middle, as a lost connection does.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
USER = "xlm"


class LoopbackHub(ThreadingHTTPServer):
    """The server; a context manager that serves in a thread.

    Attributes:
        repositories: id -> {"private": bool, "commits": [{"id": str, "files": {path: bytes}}]}.
        objects: sha256 -> the bytes that were uploaded.
        breaks: of each of the next commits whether it breaks off.
        requests: method and path of every request so far.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.objects, self.breaks, self.requests = {}, {}, [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def add(self, repo_id, files):
        """Put a public repository there."""
        self.repositories[repo_id] = {"private": False, "commits": [{"id": "0" * 40, "files": files}]}

    def files(self, repo_id):
        """The files of the newest commit."""
        return self.repositories[repo_id]["commits"][-1]["files"]

    def environment(self, home, token=TOKEN):
        """Environment variables of a process that shall take this for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": token} if token else {}),
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_):
        pass

    def _answer(self):
        self.server.requests.append((self.command, self.path))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._read_chunks()
        self.url = unquote(urlsplit(self.path).path)
        for (method, pattern), answer in _ROUTES.items():
            match = re.fullmatch(pattern, self.url)
            if match and self.command in method.split():
                return answer(self, **match.groupdict())
        return self._error(404, "no such page")

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _read_chunks(self):
        parts = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        return b"".join(parts)

    def _send(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content, status=200):
        self._send(status, json.dumps(content).encode(), Content_Type="application/json")

    def _error(self, status, message, code=None):
        self._send(status, json.dumps({"error": message}).encode(), **({"X_Error_Code": code} if code else {}))

    def _is_logged_in(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_write(self, repo_id):
        if not self._is_logged_in():
            self._error(401, "Invalid username or password.")
        elif repo_id.split("/")[0] != USER:
            self._error(403, f"You have no rights to the namespace {repo_id.split('/')[0]}.")
        else:
            return True
        return False

    def _repository(self, repo_id):
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository["private"] and not self._is_logged_in()):
            # As the Hub does: whoever is not logged in cannot tell a private repository from none.
            self._error(404 if self._is_logged_in() else 401, "Repository not found", "RepoNotFound")
            return None
        return repository

    def _commit(self, repository, revision):
        commits = [c for c in repository["commits"] if revision in ("main", c["id"])]
        if not commits:
            self._error(404, "no such revision", "RevisionNotFound")
            return None
        return commits[-1]

    def whoami(self):
        if self._is_logged_in():
            return self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        return self._error(401, "Invalid username or password.")

    def validate_yaml(self):
        self._json({"errors": [], "warnings": []})

    def create(self):
        options = json.loads(self.body)
        repo_id = f"{options.get('organization') or USER}/{options['name']}"
        if not self._may_write(repo_id):
            return None
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repositories:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        private = options.get("visibility") == "private"
        first = {"id": "0" * 40, "files": {}}
        self.server.repositories[repo_id] = {"private": private, "commits": [first]}
        return self._json({"url": url})

    def preupload(self, repo, revision):
        if self._may_write(repo) and self._repository(repo):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".pt", ".pth")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._json({"files": modes})

    def lfs_batch(self, repo):
        if self._may_write(repo):
            upload = {"upload": {"href": f"{self.server.url}/lfs/OID"}}
            objects = json.loads(self.body)["objects"]
            for entry in objects:
                if entry["oid"] not in self.server.objects:
                    entry["actions"] = json.loads(json.dumps(upload).replace("OID", entry["oid"]))
            self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "the content is not what its hash says")
        self.server.objects[oid] = self.body
        return self._send(200)

    def commit(self, repo, revision):
        repository = self._repository(repo) if self._may_write(repo) else None
        if repository is None:
            return None
        if self.server.breaks and self.server.breaks.pop(0):
            self.close_connection = True
            return self.connection.close()
        files = dict(repository["commits"][-1]["files"])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit_id = hashlib.sha1(self.body + str(len(repository["commits"])).encode()).hexdigest()
        repository["commits"].append({"id": commit_id, "files": files})
        url = f"{self.server.url}/{repo}/commit/{commit_id}"
        return self._json({"success": True, "commitOid": commit_id, "commitUrl": url, "hookOutput": ""})

    def info(self, repo, revision="main"):
        repository = self._repository(repo)
        commit = repository and self._commit(repository, revision)
        if commit:
            siblings = [{"rfilename": name} for name in sorted(commit["files"])]
            details = {"id": repo, "modelId": repo, "sha": commit["id"], "private": repository["private"]}
            self._json({**details, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo, revision, path=""):
        repository = self._repository(repo)
        commit = repository and self._commit(repository, revision)
        if commit:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in sorted(commit["files"].items())
                if name.startswith(path)
            ]
            self._json(entries)

    def resolve(self, repo, revision, path):
        repository = self._repository(repo)
        commit = repository and self._commit(repository, revision)
        if not commit:
            return None
        if path not in commit["files"]:
            return self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit["id"])
        content = commit["files"][path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._send(200, content, ETag=etag, X_Repo_Commit=commit["id"], Accept_Ranges="bytes")


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = {
    ("GET", r"/api/whoami-v2"): _Handler.whoami,
    ("POST", r"/api/validate-yaml"): _Handler.validate_yaml,
    ("POST", r"/api/repos/create"): _Handler.create,
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)"): _Handler.preupload,
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)"): _Handler.commit,
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)"): _Handler.info,
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)/?(?P<path>.*)"): _Handler.tree,
    ("GET", rf"/api/models/{_REPO}"): _Handler.info,
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch"): _Handler.lfs_batch,
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)"): _Handler.lfs_upload,
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"): _Handler.resolve,
}
