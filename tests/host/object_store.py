"""A small Google Cloud Storage on 127.0.0.1, in memory: what gcsfs, google-cloud-storage and
TensorStore ask of its JSON API."""

import base64
import contextlib
import hashlib
import http.server
import itertools
import json
import threading
import urllib.parse

PAGE = 3  # objects in a list, of which a real one holds 1000


class Store:
    """The server, while it is open; `objects` is {bucket: {name: (generation, bytes)}}."""

    def __init__(self, *buckets):
        self.objects = {bucket: {} for bucket in buckets}
        self.forbidden = set()  # buckets that may be read only
        self.lock = threading.Lock()
        self.generations = itertools.count(1)
        self.uploads = {}  # begun and not complete: {id: (bucket, name, bytes)}
        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self._server.daemon_threads = True
        self._server.store = self
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        # Where the three clients look, also for the credentials of a cloud machine.
        address = self.url.removeprefix('http://')
        self.environment = {
            'STORAGE_EMULATOR_HOST': self.url, 'TENSORSTORE_GCS_HTTP_URL': self.url,
            'GCE_METADATA_ROOT': address, 'GCE_METADATA_HOST': address, 'GCE_METADATA_IP': address,
        }  # fmt: skip

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def read(self, bucket, name):
        return self.objects[bucket][name][1]

    def names(self, bucket, prefix=''):
        with self.lock:
            return sorted(name for name in self.objects[bucket] if name.startswith(prefix))


class Refused(Exception):
    """An answer other than 200: its status."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # clients end requests that they need no more
            super().handle()

    def do_GET(self):
        self._answer()

    do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _answer(self):
        url = urllib.parse.urlsplit(self.path)
        # Object names hold slashes, which come as %2F.
        parts = [urllib.parse.unquote(part) for part in url.path.strip('/').split('/')]
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self._body()
        store = self.server.store
        status, headers, content = 200, {}, b''
        try:
            with store.lock:
                kind = parts.pop(0) if parts[0] in ('upload', 'download') else ''
                # storage/v1/b/BUCKET[/o[/NAME[/moveTo/o/NAME]]]
                if parts[:3] != ['storage', 'v1', 'b'] or parts[3] not in store.objects:
                    raise Refused(404)
                bucket, *rest = parts[3:]
                if self.command != 'GET' and bucket in store.forbidden:
                    raise Refused(403)
                objects = store.objects[bucket]
                if kind == 'upload':
                    status, headers, content = self._upload(bucket, objects, query, body)
                elif not rest:
                    content = {'kind': 'storage#bucket', 'name': bucket}
                elif rest == ['o']:
                    content = self._list(bucket, objects, query)
                else:
                    status, headers, content = self._object(
                        bucket, objects, rest[1], rest[2:], query, kind
                    )
        except Refused as refused:
            status = refused.args[0]
            content = {'error': {'code': status, 'message': f'refused with {status}'}}
        if isinstance(content, dict):
            headers = {'Content-Type': 'application/json', **headers}
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(content)

    def _body(self):
        if self.headers.get('Transfer-Encoding') == 'chunked':
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)
        return self.rfile.read(int(self.headers.get('Content-Length', 0)))

    def _check(self, query, generation):
        """Preconditions; generation 0 stands for no object."""
        if int(query.get('ifGenerationMatch', generation)) != generation:
            raise Refused(412)
        if int(query.get('ifGenerationNotMatch', -1)) == generation:
            raise Refused(304 if self.command == 'GET' else 412)

    def _list(self, bucket, objects, query):
        prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
        found = set()  # objects, and prefixes up to the delimiter
        for name in objects:
            if name.startswith(prefix):
                head, delimited, _ = name[len(prefix) :].partition(delimiter or '\0')
                found.add(prefix + head + delimited)
        page = sorted(name for name in found if name > query.get('pageToken', ''))
        more, page = page[PAGE:], page[:PAGE]
        names = [name for name in page if not (delimiter and name.endswith(delimiter))]
        return {
            'kind': 'storage#objects',
            'items': [metadata(bucket, name, *objects[name]) for name in names],
            'prefixes': sorted(set(page) - set(names)),
            **({'nextPageToken': page[-1]} if more else {}),
        }

    def _object(self, bucket, objects, name, target, query, kind):
        generation, content = objects.get(name, (0, b''))
        self._check(query, generation)
        if not generation:
            raise Refused(404)
        if self.command == 'DELETE':
            del objects[name]
            return 204, {}, b''
        if self.command == 'POST':
            moved = next(self.server.store.generations), objects.pop(name)[1]
            objects[target[2]] = moved
            return 200, {}, metadata(bucket, target[2], *moved)
        if query.get('alt') != 'media' and kind != 'download':
            return 200, {}, metadata(bucket, name, generation, content)
        headers = {'Content-Type': 'application/octet-stream', 'x-goog-generation': generation}
        wanted = self.headers.get('Range')
        if wanted is None:
            return 200, headers, content
        first, last = wanted.removeprefix('bytes=').split('-')
        if not first:
            start, end = max(0, len(content) - int(last)), len(content)
        else:
            start, end = int(first), min(int(last or len(content)) + 1, len(content))
        if start >= len(content):
            raise Refused(416)
        headers['Content-Range'] = f'bytes {start}-{end - 1}/{len(content)}'
        return 206, headers, content[start:end]

    def _upload(self, bucket, objects, query, body):
        store = self.server.store
        if 'upload_id' in query:
            bucket, name, before = store.uploads.pop(query['upload_id'])
            content = before + body
            if self.headers['Content-Range'].endswith('/*'):
                store.uploads[query['upload_id']] = bucket, name, content
                return 308, {'Range': f'bytes=0-{len(content) - 1}'}, b''
        elif query['uploadType'] == 'resumable':
            upload_id = str(next(store.generations))
            store.uploads[upload_id] = bucket, query['name'], b''
            where = f'{store.url}/upload/storage/v1/b/{bucket}/o?upload_id={upload_id}'
            return 200, {'Location': where}, b''
        elif query['uploadType'] == 'multipart':
            boundary = self.headers['Content-Type'].split('boundary=')[1].strip('"').encode()
            _, about, data, _ = body.split(b'--' + boundary, 3)
            name = json.loads(about.split(b'\n\n', 1)[1])['name']
            content = data.split(b'\n\n', 1)[1].removesuffix(b'\n')
        else:
            name, content = query['name'], body
        self._check(query, objects.get(name, (0, b''))[0])
        objects[name] = next(store.generations), content
        return 200, {}, metadata(bucket, name, *objects[name])


def metadata(bucket, name, generation, content):
    return {
        'kind': 'storage#object', 'bucket': bucket, 'name': name, 'generation': str(generation),
        'metageneration': '1', 'size': str(len(content)),
        'md5Hash': base64.b64encode(hashlib.md5(content).digest()).decode(),
        'timeCreated': '2000-01-01T00:00:00.000Z', 'updated': '2000-01-01T00:00:00.000Z',
        'contentType': 'application/octet-stream',
    }  # fmt: skip
