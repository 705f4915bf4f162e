"""A running server of an app, and its clients."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request


@contextlib.contextmanager
def running(app):
    """Serve an app on a free port in a thread; yield its address."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def ask(address, **request):
    """Return the JSON that answers a request of these fields."""
    body = json.dumps(request).encode()
    headers = {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as answer:
        return json.load(answer)


def refusal(address, body, **headers):
    """Return the status and the JSON that refuse a body of bytes."""
    headers = {"content-type": "application/json"} | headers
    try:
        urllib.request.urlopen(urllib.request.Request(address, body, headers)).close()
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    raise AssertionError("the request was not refused")
