"""A server on this machine that stands in for the web, with the faults that servers have."""

import contextlib
import http.server
import re
import threading


class Web:
    """Serves `files` by path; `log` has (path, headers) of every request.

    cut: bytes after which the connection is closed; ranges: whether parts can be requested; shift: how far a
    part is off; moved: {path: URL} of redirects; fails: HTTP statuses of the next answers; sized: whether the
    length is sent.
    """

    def __init__(self):
        self.files, self.log, self.moved, self.fails = {}, [], {}, []
        self.cut, self.ranges, self.shift, self.sized, self.url = None, True, 0, True, ''

    def paths(self):
        return [path for path, _ in self.log]


@contextlib.contextmanager
def serve():
    web = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):  # noqa: N802
            web.log.append((self.path, dict(self.headers)))
            if web.fails:
                return self.send_error(web.fails.pop(0))
            if self.path in web.moved:
                self.send_response(302)
                self.send_header('Location', web.moved[self.path])
                return self.end_headers()
            if self.path not in web.files:
                return self.send_error(404)
            data, start = web.files[self.path], 0
            asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
            if asked and web.ranges:
                start = int(asked[1]) + web.shift
                if start >= len(data):
                    return self.send_error(416)
                self.send_response(206)
                self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
            else:
                self.send_response(200)
            if web.sized:
                self.send_header('Content-Length', str(len(data) - start))
            self.end_headers()
            end = None if web.cut is None else start + web.cut
            self.wfile.write(data[start:end])

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    web.url = f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
