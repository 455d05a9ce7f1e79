"A stand-in of the Hugging Face Hub on loopback: it makes repositories, takes commits, large files by git-lfs, and gives files back."
import base64, hashlib, json, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback_secret"


def sha1(data): return hashlib.sha1(data).hexdigest()


class Hub:
    "Serves inside `with`; its address is what HF_ENDPOINT shall be. `repos` is (type, user/name): a dictionary with `private`, `files` and `commit`."
    def __init__(self):
        self.repos, self.blobs, self.asked = {}, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *_): pass
            def do_GET(self): hub.serve(self)
            do_HEAD = do_POST = do_PUT = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.routes = [(method, re.compile(pattern + "$"), answer) for method, pattern, answer in (
            ("POST", r"/api/repos/create", self.create), ("POST", r"/api/validate-yaml", lambda request: {"errors": [], "warnings": []}),
            ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/preupload/main", self.preupload), ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/commit/main", self.commit),
            ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch), ("PUT", r"/blobs/(\w+)", self.put),
            ("GET", r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/(\w+))?", self.info), ("GET", r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/\w+(?:/(.+))?", self.tree),
            ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/paths-info/\w+", self.paths), ("GET|HEAD", r"/(datasets/)?([^/]+/[^/]+)/resolve/\w+/(.+)", self.resolve))]

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def serve(self, request):
        path = unquote(urlsplit(request.path).path)
        request.body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        request.may = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.asked.append((request.command, path))
        for method, pattern, answer in self.routes:
            if (found := pattern.match(path)) and re.fullmatch(method, request.command):
                if request.command in ("POST", "PUT") and not (request.may or "/blobs/" in path or "paths-info" in path): said = 401, {"error": "Invalid username or password."}
                else: said = answer(request, *found.groups())
                break
        else: said = 404, {"error": f"{request.command} {path} is none of this stand-in"}
        if isinstance(said, dict | list): said = 200, said
        status, content, *headers = said
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **(headers[0] if headers else {})}.items(): request.send_header(name, str(value))
        request.end_headers()
        if request.command != "HEAD": request.wfile.write(data)

    def missing(self, code="RepoNotFound"): return 404, {"error": "not found"}, {"X-Error-Code": code, "X-Error-Message": "not found"}

    def repo(self, request, kind, name):
        "A repository, or None where there is none for who asks."
        found = self.repos.get((kind, name))
        return found if found and (request.may or not found["private"]) else None

    def create(self, request):
        asked = json.loads(request.body)
        kind, name = asked.get("type", "model"), f"{asked['organization'] or 'me'}/{asked['name']}"
        url = {"url": f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{name}"}
        if (kind, name) in self.repos: return 409, url | {"error": "You already created this repository"}
        self.repos[kind, name] = dict(private=asked.get("private", asked.get("visibility") == "private"), files={}, commit=sha1(name.encode()))
        return url

    def preupload(self, request, kind, name):
        if not self.repo(request, kind, name): return self.missing()
        mode = lambda path: "lfs" if path.endswith((".safetensors", ".parquet")) else "regular"
        return {"files": [dict(path=f["path"], uploadMode=mode(f["path"]), shouldIgnore=False) for f in json.loads(request.body)["files"]]}

    def batch(self, request, kind, name):
        here = lambda oid: {} if oid in self.blobs else {"actions": {"upload": {"href": f"{self.url}/blobs/{oid}"}}}
        return {"transfer": "basic", "objects": [dict(o, **here(o["oid"])) for o in json.loads(request.body)["objects"]]}

    def put(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid: return 422, {"error": "other bytes than were promised"}
        self.blobs[oid] = request.body
        return {}

    def commit(self, request, kind, name):
        repo = self.repo(request, kind, name)
        for line in map(json.loads, request.body.splitlines()):
            value, files = line["value"], repo["files"]
            if line["key"] == "file": files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile": files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile": del files[value["path"]]
        repo["commit"] = sha1(repo["commit"].encode() + request.body)
        return {"commitOid": repo["commit"], "commitUrl": f"{self.url}/{name}/commit/{repo['commit']}", "success": True}

    def info(self, request, kind, name, revision):
        if not (repo := self.repo(request, kind, name)): return self.missing()
        return dict(id=name, sha=repo["commit"], private=repo["private"], tags=[], siblings=[dict(rfilename=f) for f in repo["files"]])

    def entry(self, path, content):
        if isinstance(content, bytes): return dict(type="file", path=path, size=len(content), oid=sha1(content))
        size = len(self.blobs[content])
        return dict(type="file", path=path, size=size, oid=sha1(content.encode()), lfs=dict(oid=content, size=size, pointerSize=100))

    def tree(self, request, kind, name, under):
        if not (repo := self.repo(request, kind, name)): return self.missing()
        before = f"{under}/" if under else ""
        inside = {f: x for f, x in sorted(repo["files"].items()) if f.startswith(before)}
        if under and not inside: return self.missing("EntryNotFound")
        folders = {f[:f.index("/", len(before))] for f in inside if "/" in f[len(before):]}
        if "recursive=true" not in request.path.lower(): inside = {f: x for f, x in inside.items() if "/" not in f[len(before):]}
        return [self.folder(f) for f in sorted(folders)] + [self.entry(f, x) for f, x in inside.items()]

    def folder(self, path): return dict(type="directory", path=path, oid=sha1(path.encode()))

    def paths(self, request, kind, name):
        repo, asked = self.repo(request, kind, name), request.body.decode()
        if not repo: return self.missing()
        wanted = json.loads(asked)["paths"] if asked.startswith("{") else re.findall(r"paths=([^&]+)", unquote(asked))
        folders = {f.rpartition("/")[0] for f in repo["files"]}
        return [self.entry(f, repo["files"][f]) for f in wanted if f in repo["files"]] + [self.folder(f) for f in wanted if f in folders]

    def resolve(self, request, kind, name, path):
        if not (repo := self.repo(request, "dataset" if kind else "model", name)): return self.missing()
        here = {"X-Repo-Commit": repo["commit"]}
        if path not in repo["files"]: return 404, {"error": "no such file"}, here | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"}
        content = repo["files"][path]
        if isinstance(content, bytes): data, tag = content, {"ETag": f'"{sha1(content)}"'}
        else: data, tag = self.blobs[content], {"ETag": f'"{content}"', "X-Linked-Etag": f'"{content}"', "X-Linked-Size": len(self.blobs[content])}
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "bytes=0-").groups()
        part = data[int(first):int(last) + 1 if last else None]
        if len(part) == len(data): return 200, data, here | tag | {"Content-Type": "application/octet-stream"}
        return 206, part, here | tag | {"Content-Type": "application/octet-stream", "Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}
