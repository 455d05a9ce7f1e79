"An OpenAI-compatible endpoint on loopback, for tests and lessons: it answers as it is told to, and fails as it is told to."
import base64, io, json, socket, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


class Endpoint:
    """Serves POST /v1/chat/completions inside `with`. `answer(goal, picture, request)` returns a verdict (a dict) or any text. What is in `faults` comes first:
    a status, ("refuses", status, body), ("says", content, finish_reason) or a word. Failures ask for `rest` seconds, or in headers of their own."""
    def __init__(self, answer, key="sk-loopback"):
        self.answer, self.key, self.faults, self.requests, self.rest = answer, key, [], [], "0.01"
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *_): pass
            def do_POST(self): endpoint.serve(self, self.rfile.read(int(self.headers["Content-Length"])))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = "http://127.0.0.1:{}/v1".format(self.server.server_port)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def serve(self, handler, body):
        request, said = json.loads(body), handler.headers.get("Authorization", "")
        self.requests.append(request)
        fault = self.faults.pop(0) if self.faults else None
        if said != f"Bearer {self.key}": return self.reply(handler, 401, {"error": {"message": f"Incorrect API key provided: {said}"}})
        if handler.path != "/v1/chat/completions": return self.reply(handler, 404, {"error": {"message": "no such path"}})
        if isinstance(fault, int): return self.reply(handler, fault, {"error": {"message": f"status {fault} for {said}"}})
        if isinstance(fault, tuple) and fault[0] == "refuses": return self.send(handler, fault[1], fault[2].encode(), "application/json" if fault[2][:1] in "{[" else "text/plain")
        if fault == "slow": time.sleep(3)
        if fault == "cut": return handler.connection.shutdown(socket.SHUT_RDWR)
        if fault == "drip": return self.drip(handler)
        if fault == "garbage": return self.send(handler, 200, b"<html>busy</html>", "text/html")
        content, finish = (*fault[1:], "stop")[:2] if isinstance(fault, tuple) else (self.answer(*question(request), request), "stop")
        self.reply(handler, 200, {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"], "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
                                  "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": json.dumps(content) if isinstance(content, dict) else content}}]})

    def reply(self, handler, status, content): self.send(handler, status, json.dumps(content).encode(), "application/json")

    def send(self, handler, status, data, kind):
        handler.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(data))), *(self.rest if isinstance(self.rest, dict) else {"Retry-After": self.rest}).items()): handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def drip(self, handler): # a blank every now and then, as some endpoints do while they think
        handler.send_response(200)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", "30")): handler.send_header(name, value)
        handler.end_headers()
        try:
            for _ in range(30):
                handler.wfile.write(b" ")
                time.sleep(.1)
        except OSError: pass # nobody listens any more


def question(request):
    "Goal and picture of the last message."
    text, picture = request["messages"][-1]["content"]
    data = base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])
    return text["text"].removeprefix("Goal: "), Image.open(io.BytesIO(data)).convert("RGB")
