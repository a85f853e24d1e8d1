"""A local S3 that asks for credentials."""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pyarrow.fs as pafs
from moto.server import ThreadedMotoServer

REGION = "us-east-1"


class S3Server:
    """Moto's server on a free port of this machine, with one user who may do anything.

    Attributes:
        port: of 127.0.0.1.
        access_key: of the user.
        secret_key: of the user.
        num_refused: requests that were answered by 503.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        _, self.port = self._server.get_host_and_port()
        self._post("reset")  # what another server of this process has left: they share their memory
        self.num_refused = 0
        self._refusals: Iterator[bool] = iter(())
        self._serve()
        self.access_key, self.secret_key = self._make_user()
        self._check_credentials("0")
        self.writer = pafs.S3FileSystem(
            access_key=self.access_key,
            secret_key=self.secret_key,
            endpoint_override=f"127.0.0.1:{self.port}",
            scheme="http",
            region=REGION,
            allow_bucket_creation=True,
        )

    @property
    def settings(self) -> str:
        """What follows ``s3://bucket/folder`` to reach this server."""
        return f"?endpoint_override=127.0.0.1:{self.port}&scheme=http&region={REGION}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that hold the user's credentials, and keep the AWS library from looking for others."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def copy(self, folder: Path, bucket: str) -> None:
        """Puts everything in a folder into a bucket, which is made for it."""
        self.writer.create_dir(bucket)
        pafs.copy_files(str(folder), bucket, pafs.LocalFileSystem(), self.writer)

    def refuse(self, num_requests: int, after: int = 0) -> None:
        """Has the next requests answered by 503, after some more that are not."""
        self.num_refused = 0
        self._refusals = iter([False] * after + [True] * num_requests)

    def _serve(self) -> None:
        """Puts the refusals in front of moto."""
        server: Any = self._server._server
        app = server.app

        def answer(environment: dict[str, Any], start: Any) -> Any:
            if not next(self._refusals, False):
                return app(environment, start)
            self.num_refused += 1
            body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [] if environment["REQUEST_METHOD"] == "HEAD" else [body]

        server.app = answer

    def stop(self) -> None:
        self._check_credentials("inf")
        self._server.stop()

    def _make_user(self) -> tuple[str, str]:
        iam = boto3.client(
            "iam",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name=REGION,
            aws_access_key_id="any",
            aws_secret_access_key="any",
        )
        iam.create_user(UserName="reader")
        policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
        iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    def _check_credentials(self, after_requests: str) -> None:
        self._post("reset-auth", after_requests)

    def _post(self, what: str, text: str = "") -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/moto-api/{what}",
            data=text.encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).close()


@contextmanager
def run_s3() -> Iterator[S3Server]:
    """A server that is stopped at the end."""
    server = S3Server()
    try:
        yield server
    finally:
        server.stop()
