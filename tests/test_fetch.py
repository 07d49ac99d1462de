"""The fetcher against real sockets: what it brings, what it refuses, and that it always ends."""

from __future__ import annotations

import gzip
import shutil
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vlmchat import fetch as fetch_module
from vlmchat.config import ImagePolicy
from vlmchat.errors import FetchRefused, ImageRejected, NetworkError
from vlmchat.fetch import fetch, is_public
from vlmchat.shown import shown

PRIVATE_ALLOWED = ImagePolicy(allow_private_urls=True, timeout_s=20.0)
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """Answers each path with a function; forgets clients that hang up."""

    daemon_threads = True

    def __init__(self, host: str) -> None:
        super().__init__((host, 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.seen: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append(dict(self.headers))
        self.server.answers[self.path](self)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def body(data: bytes, status: int = 200, length: bool = True, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if length:
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def redirect(location: str) -> Answer:
    return body(b"", 302, Location=location)


def serve(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    yield from serve(Server("127.0.0.1"))


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose address, 127.0.0.2, counts as public for once."""
    monkeypatch.setattr(
        fetch_module, "is_public", lambda address: address == "127.0.0.2" or is_public(address)
    )
    yield from serve(Server("127.0.0.2"))


def test_fetch_brings_the_body(server: Server) -> None:
    server.answers["/a.png?size=2"] = body(b"picture", Content_Type="image/png")
    assert fetch(f"{server.url}/a.png?size=2", PRIVATE_ALLOWED) == b"picture"


def test_fetch_sends_no_cookies_credentials_or_proxy_requests(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server.answers["/a"] = body(b"", 302, Location="/b", Set_Cookie="a=b")
    server.answers["/b"] = body(b"picture")
    assert fetch(f"{server.url}/a", PRIVATE_ALLOWED) == b"picture"
    assert {name.lower() for name in server.seen[1]} == {
        *("host", "user-agent", "accept", "accept-encoding", "connection")
    }


def test_fetch_dials_the_address_it_checked_and_keeps_the_host_header(server: Server) -> None:
    server.answers["/a"] = body(b"picture")
    calls = []

    def resolve(host: str, port: int) -> list[str]:
        calls.append(host)
        return ["127.0.0.1"]

    assert fetch(f"http://rebind.test:{server.server_port}/a", PRIVATE_ALLOWED, resolve)
    assert calls == ["rebind.test"]
    assert server.seen[0]["Host"] == f"rebind.test:{server.server_port}"


def test_fetch_tries_the_next_address_when_one_refuses(server: Server) -> None:
    server.answers["/a"] = body(b"picture")
    addresses = ["127.0.0.3", "127.0.0.1"]
    url = f"http://two.test:{server.server_port}/a"
    assert fetch(url, PRIVATE_ALLOWED, lambda host, port: addresses) == b"picture"


@pytest.mark.parametrize(
    "address",
    [
        pytest.param("127.0.0.1", id="loopback"),
        pytest.param("10.1.2.3", id="private"),
        pytest.param("169.254.169.254", id="cloud-metadata"),
        pytest.param("168.63.129.16", id="azure-platform"),
        pytest.param("100.64.0.1", id="carrier-grade-nat"),
        pytest.param("224.0.0.1", id="multicast"),
        pytest.param("240.0.0.1", id="reserved"),
        pytest.param("255.255.255.255", id="broadcast"),
        pytest.param("0.0.0.0", id="unspecified"),
        pytest.param("192.0.2.1", id="documentation"),
        pytest.param("::1", id="ipv6-loopback"),
        pytest.param("::", id="ipv6-unspecified"),
        pytest.param("fe80::1%lo", id="ipv6-link-local-with-zone"),
        pytest.param("fec0::1", id="ipv6-site-local"),
        pytest.param("fd00:ec2::254", id="ipv6-unique-local"),
        pytest.param("ff02::1", id="ipv6-multicast"),
        pytest.param("::ffff:10.0.0.1", id="ipv4-mapped"),
        pytest.param("::7f00:1", id="ipv4-compatible"),
        pytest.param("64:ff9b::a00:1", id="nat64-of-private"),
        pytest.param("64:ff9b:1::808:808", id="local-nat64"),
        pytest.param("2002:7f00:1::", id="6to4-of-loopback"),
        pytest.param("2001:0:4136:e378:8000:63bf:80ff:fffe", id="teredo"),
    ],
)
def test_fetch_refuses_a_host_with_any_address_that_is_not_public(address: str) -> None:
    with pytest.raises(FetchRefused, match="not a public address; --allow-private-urls"):
        fetch("http://host.test/", ImagePolicy(), lambda host, port: ["93.184.215.14", address])


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800:21f::1", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_is_public_accepts_addresses_of_the_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://2130706433/", id="decimal"),
        pytest.param("http://0x7f.1/", id="hexadecimal"),
        pytest.param("http://0177.0.0.1/", id="octal"),
        pytest.param("http://127.1/", id="short"),
        pytest.param("http://[::ffff:7f00:1]/", id="ipv4-mapped"),
        pytest.param("http://localhost/", id="name"),
        pytest.param("http://user@93.184.215.14/", id="user"),
        pytest.param("http://user:secret@93.184.215.14/", id="password"),
        pytest.param("http://@93.184.215.14/", id="empty-user"),
        pytest.param("http://93.184.215.14\\@127.0.0.1/", id="backslash"),
        pytest.param("http://93.184.215.14/\r\nHost: inside", id="line-break"),
        pytest.param("ftp://93.184.215.14/a.png", id="ftp"),
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("http:///a.png", id="no-host"),
        pytest.param("http://[::1/", id="bracket"),
    ],
)
def test_fetch_refuses_addresses_written_to_deceive(url: str) -> None:
    with pytest.raises(FetchRefused) as refusal:
        fetch(url, ImagePolicy())
    assert refusal.value.message.isprintable()
    assert "secret" not in refusal.value.message


def test_fetch_refuses_a_redirect_to_a_private_address(outside: Server, server: Server) -> None:
    server.answers["/secret"] = body(b"secret")
    outside.answers["/a"] = redirect(f"{server.url}/secret")
    with pytest.raises(FetchRefused, match=r"resolves to 127\.0\.0\.1"):
        fetch(f"{outside.url}/a", ImagePolicy())
    assert server.seen == []


def test_fetch_refuses_a_name_whose_address_turns_private_between_hops(outside: Server) -> None:
    outside.answers["/a"] = redirect("/b")
    addresses = iter(["127.0.0.2", "127.0.0.1"])
    with pytest.raises(FetchRefused, match=r"resolves to 127\.0\.0\.1"):
        fetch(
            f"http://rebind.test:{outside.server_port}/a",
            ImagePolicy(),
            lambda host, port: [next(addresses)],
        )


def test_fetch_refuses_a_redirect_to_another_scheme(server: Server) -> None:
    server.answers["/a"] = redirect("file:///etc/passwd")
    with pytest.raises(FetchRefused, match="only http and https"):
        fetch(f"{server.url}/a", PRIVATE_ALLOWED)


def test_fetch_follows_three_redirects_and_refuses_the_fourth(server: Server) -> None:
    for hop in range(4):
        server.answers[f"/{hop}"] = redirect(f"/{hop + 1}")
    server.answers["/4"] = body(b"picture")
    assert fetch(f"{server.url}/1", PRIVATE_ALLOWED) == b"picture"
    with pytest.raises(FetchRefused, match="more than 3 redirects"):
        fetch(f"{server.url}/0", PRIVATE_ALLOWED)


def test_fetch_ends_when_a_page_redirects_to_itself(server: Server) -> None:
    server.answers["/a"] = redirect("/a")
    with pytest.raises(FetchRefused, match="redirects"):
        fetch(f"{server.url}/a", PRIVATE_ALLOWED)


def test_fetch_rejects_a_declared_length_over_the_limit(server: Server) -> None:
    server.answers["/a"] = body(b"x" * 2048)
    policy = ImagePolicy(allow_private_urls=True, max_bytes=1024)
    with pytest.raises(ImageRejected, match=r"2 KiB, more than .* 1 KiB; raise --max-image-bytes"):
        fetch(f"{server.url}/a", policy)


def test_fetch_stops_reading_at_the_limit_without_a_declared_length(server: Server) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 65536)

    server.answers["/a"] = endless
    with pytest.raises(ImageRejected, match="limit of 1 MiB; raise --max-image-bytes"):
        fetch(f"{server.url}/a", ImagePolicy(allow_private_urls=True, max_bytes=2**20))


def test_fetch_limits_what_a_compressed_body_becomes(server: Server) -> None:
    server.answers["/a"] = body(gzip.compress(b"\0" * 2**25), Content_Encoding="gzip")
    tracemalloc.start()
    try:
        with pytest.raises(ImageRejected, match="limit of 1 MiB"):
            fetch(f"{server.url}/a", ImagePolicy(allow_private_urls=True, max_bytes=2**20))
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        pytest.param("gzip", gzip.compress(b"picture"), id="gzip"),
        pytest.param("identity", b"picture", id="identity"),
    ],
)
def test_fetch_undoes_known_encodings(server: Server, encoding: str, data: bytes) -> None:
    server.answers["/a"] = body(data, Content_Encoding=encoding)
    assert fetch(f"{server.url}/a", PRIVATE_ALLOWED) == b"picture"


@pytest.mark.parametrize(("encoding", "words"), [("br", "encoding br"), ("gzip", "compression")])
def test_fetch_rejects_encodings_it_cannot_undo(server: Server, encoding: str, words: str) -> None:
    server.answers["/a"] = body(b"picture", Content_Encoding=encoding)
    with pytest.raises(ImageRejected, match=words):
        fetch(f"{server.url}/a", PRIVATE_ALLOWED)


def drip(handler: BaseHTTPRequestHandler) -> None:
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def drip_body(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    drip(handler)


@pytest.mark.parametrize(
    "answer", [pytest.param(drip, id="headers"), pytest.param(drip_body, id="body")]
)
def test_fetch_ends_at_the_deadline_however_slowly_it_drips(server: Server, answer: Answer) -> None:
    server.answers["/a"] = answer
    with pytest.raises(NetworkError, match=r"not received within 0\.3 s; raise --image-timeout"):
        fetch(f"{server.url}/a", ImagePolicy(allow_private_urls=True, timeout_s=0.3))


def test_fetch_ends_at_the_deadline_when_the_name_server_is_silent() -> None:
    released = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        released.wait()
        return []

    with pytest.raises(NetworkError, match=r"0\.1 s; raise --image-timeout"):
        fetch("http://silent.test/", ImagePolicy(timeout_s=0.1), resolve)
    released.set()


def test_fetch_rejects_an_html_page_by_its_content_type(server: Server) -> None:
    server.answers["/a.png"] = body(b"<html>", Content_Type="text/html; charset=utf-8")
    with pytest.raises(ImageRejected, match=r"HTML page \(text/html\)"):
        fetch(f"{server.url}/a.png", PRIVATE_ALLOWED)


@pytest.mark.parametrize(
    ("status", "words"), [(404, "404 Not Found"), (500, "500 "), (304, "304 "), (599, "599")]
)
def test_fetch_tells_the_status_of_a_failure(server: Server, status: int, words: str) -> None:
    server.answers["/a"] = body(b"", status)
    with pytest.raises(NetworkError, match=f"/a: the server answered {words}"):
        fetch(f"{server.url}/a", PRIVATE_ALLOWED)


def test_fetch_tells_when_the_connection_is_refused(server: Server) -> None:
    with pytest.raises(NetworkError, match=r"cannot reach 127\.0\.0\.3 port \d+: .*refused"):
        fetch(f"http://127.0.0.3:{server.server_port}/", PRIVATE_ALLOWED)


@pytest.mark.parametrize(
    "host",
    ["nowhere.invalid", "a..b", "x" * 80, "%00"],
    ids=["unknown", "empty-label", "long-label", "nul"],
)
def test_fetch_tells_when_the_host_is_not_known(host: str) -> None:
    with pytest.raises((NetworkError, FetchRefused)) as failure:
        fetch(f"http://{host}/", PRIVATE_ALLOWED)
    assert host[:40] in failure.value.message


def garbage(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\0\xff not http\r\n\r\n")


def cut_short(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"half")


@pytest.mark.parametrize("answer", [garbage, cut_short])
def test_fetch_tells_when_the_server_does_not_speak_http(server: Server, answer: Answer) -> None:
    server.answers["/a"] = answer
    with pytest.raises(NetworkError):
        fetch(f"{server.url}/a", PRIVATE_ALLOWED)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a self-signed certificate for tls.test, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tls.test"]
    command += ["-addext", "subjectAltName=DNS:tls.test", "-keyout", "-", "-out", "-"]
    path.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    return path


@pytest.fixture
def tls_server(server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server.answers["/a"] = body(b"picture")
    plain, server.socket = server.socket, context.wrap_socket(server.socket, server_side=True)
    plain.close()
    return server


def test_fetch_verifies_the_certificate_against_the_name_not_the_address(
    tls_server: Server,
) -> None:
    url = f"https://tls.test:{tls_server.server_port}/a"
    assert fetch(url, PRIVATE_ALLOWED, lambda host, port: ["127.0.0.1"]) == b"picture"


def test_fetch_rejects_a_certificate_for_another_name(tls_server: Server) -> None:
    url = f"https://other.test:{tls_server.server_port}/a"
    with pytest.raises(NetworkError, match="certificate"):
        fetch(url, PRIVATE_ALLOWED, lambda host, port: ["127.0.0.1"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("http://a/b?token=secret#f", "http://a/b?…", id="query"),
        pytest.param("http://me:secret@a/b", "http://a/b", id="userinfo"),
        pytest.param("a\nb\x1b[31m", "a�b�[31m", id="control-characters"),
        pytest.param("x" * 200, "x" * 119 + "…", id="long"),
    ],
)
def test_shown_is_one_short_line_without_secrets(text: str, expected: str) -> None:
    assert shown(text) == expected
