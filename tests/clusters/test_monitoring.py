"""Dashboard and alerts: every expression has values in a real Prometheus that scrapes a real service."""

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fakes
import httpx
import pytest
import yaml
from commands import free_port, running
from engines import make_parts
from pictures import picture
from serving import EchoEngine, asking, data_uri, served
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_ray.deployments.front import build_front
from llava_ray.deployments.gateway import LocalGateway
from llava_ray.deployments.http.auth import ApiKey, digest
from llava_ray.deployments.http.routes import Front
from llava_ray.deployments.replica import Replica
from llava_ray.deployments.settings import ServeSettings, spell_key
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.engine import Engine
from llava_ray.generate.settings import EngineSettings

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "clusters/monitoring"
DASHBOARD = json.loads((MONITORING / "grafana/dashboards/llava_ray.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
[GROUP] = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
ALERTS = {rule["alert"]: rule for rule in GROUP["rules"]}
CASES = yaml.safe_load((Path(__file__).parent / "alert_cases.yml").read_text())
KEY = "a key of more than sixteen characters"
LONG = "red blue circle " * 8
PATIENCE_S = 60.0

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus: apt-get install prometheus"
)


@contextmanager
def tiny_service(root: Path) -> Iterator[str]:
    """A service over a tiny model on the built-in engine, and over one whose engine is broken; yield its address."""
    parts = make_parts(root)
    parts.llava.language_model.generation_config.eos_token_id = fakes.EOS  # long answers, which repeat themselves
    settings = ServeSettings.parsed(
        {"model": "tiny@here,broken@there", "max_num_seqs": "3", "max_queued_requests": "1"}
    )
    engine, broken = BuiltinEngine(lambda: parts, name="tiny", settings=EngineSettings(max_running=3)), EchoEngine()
    broken.broken = "the weights are not numbers"
    engines: list[Engine] = [engine, broken]
    replicas = {source: Replica(one, source, settings) for source, one in zip(settings.sources, engines, strict=True)}
    front = Front(LocalGateway(replicas), settings, (ApiKey("all", digest(KEY)),))
    front.metrics.votes.labels("tiny", "upvote").inc()  # as the page does
    try:
        with served(_with_engine(build_front(front), engine)) as address:
            yield address
    finally:
        for replica in replicas.values():
            replica.decoder.close()


def _with_engine(app: ASGIApp, engine: Engine) -> ASGIApp:
    """Start an engine before an app and stop it after, in the same loop."""

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await engine.start()
        await app(scope, receive, send)
        await engine.stop()

    return whole


@contextmanager
def requests_to(address: str) -> Iterator[None]:
    """Ask all the time: whole and streamed answers, with and without an image, and what is refused."""
    ended = threading.Event()
    image = data_uri(picture())

    def ask() -> None:
        http = httpx.Client(base_url=address, timeout=PATIENCE_S)
        key = {"authorization": f"Bearer {KEY}"}
        while not ended.wait(0.05):
            for fields, headers, status in (
                (asking(LONG, model="tiny", max_tokens=2), key, 200),
                (asking(LONG, image, model="tiny", max_tokens=40, temperature=0, stream=True), key, 200),
                (asking("x", model="tiny", n=5), key, 429),  # more than are answered or may wait
                (asking("x", model="broken"), key, 500),
                (asking("x", model="nobody"), key, 404),
                (asking("x", model="tiny"), {}, 401),
            ):
                response = http.post("/v1/chat/completions", json=fields, headers=headers)
                assert response.status_code == status, response.text

    asking_thread = threading.Thread(target=ask, daemon=True)
    asking_thread.start()
    try:
        yield
        assert asking_thread.is_alive(), "a request was answered otherwise than it should; see above"
    finally:
        ended.set()
        asking_thread.join(PATIENCE_S)


class Prometheus:
    """A client of Prometheus' API."""

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=f"{address}/api/v1", timeout=20)

    def get(self, path: str, **parameters: str) -> Any:
        answer = self.http.get(path, params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def values(self, expression: str) -> list[float]:
        """Return the values of an expression now, without those of nothing divided by nothing."""
        found = [float(series["value"][1]) for series in self.get("query", query=expression)["result"]]
        return [value for value in found if not math.isnan(value)]

    def states(self) -> dict[str, str]:
        """Return the alerts that wait or fire."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.get("alerts")["alerts"]}


@contextmanager
def prometheus_of(service: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus with the shipped configuration: with this service's address and key, and once a second."""
    (folder / "key").write_text(KEY)
    text = (MONITORING / "prometheus.yml").read_text()
    for old, new, count in (
        ("127.0.0.1:8000", service.removeprefix("http://"), 1),
        ("15s", "1s", 2),
        ("- alerts.yml", f"- {MONITORING / 'alerts.yml'}", 1),
        ("# authorization:", "authorization:", 1),
        ("/etc/llava_ray/prometheus.key", str(folder / "key"), 1),
    ):
        assert text.count(old) == count, old
        text = text.replace(old, new)
    (folder / "prometheus.yml").write_text(text)
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with running([*command, f"--web.listen-address={address}"], folder / "log"):
        prometheus = Prometheus(f"http://{address}")

        def scraped() -> bool:
            try:  # its port is open, and answers 503 in plain text, before it can answer questions
                ready = httpx.get(f"http://{address}/-/ready", timeout=20).status_code == httpx.codes.OK
            except httpx.TransportError:
                return False
            return ready and prometheus.values("up") == [1]

        until(scraped, folder / "log")
        yield prometheus


def until(condition: Callable[[], bool], log: Path) -> None:
    """Wait for what becomes true."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < PATIENCE_S, log.read_text()[-3000:]
        time.sleep(0.2)


def panel_expressions() -> dict[str, str]:
    """Return the expressions of all panels with Grafana's variables filled in: all applications, all models."""
    filled = {"job": ".*", "model_name": ".*", "__rate_interval": "10s", "__range": "1m"}
    return {
        f"{panel['title']} {target['refId']}": re.sub(r"\$(\w+)", lambda found: filled[found[1]], target["expr"])
        for panel in PANELS
        for target in panel["targets"]
    }


def alert_expressions() -> dict[str, str]:
    """Return both sides of the alerts' conditions, with a comparison's truth in place of what passes it."""
    return {
        f"{name} {number}": re.sub(r" (==|<|>) ", r" \1 bool ", f" {side} ")
        for name, rule in ALERTS.items()
        for number, side in enumerate(re.split(r"(?:and|unless) on \([^)]*\)", rule["expr"]))
    }


@needs_prometheus
@pytest.mark.slow
def test_every_expression_has_values(tmp_path: Path) -> None:
    with tiny_service(tmp_path) as service, prometheus_of(service, tmp_path) as prometheus:
        pending = panel_expressions() | alert_expressions()
        assert len(pending) > 50
        with requests_to(service):
            until(lambda: bool(prometheus.values("rate(vllm:generation_tokens_total[10s]) > 0")), tmp_path / "log")
            start = time.monotonic()
            while pending and time.monotonic() - start < PATIENCE_S:
                pending = {name: told for name, told in pending.items() if not prometheus.values(told)}
                time.sleep(0.2)
            assert not pending, pending
            assert prometheus.values('llava_ray:http_refused_total{code="model_not_found"}')
            until(lambda: prometheus.states().get("LlavaRayEngineFailed") == "firing", tmp_path / "log")
        firing = {name for name, state in prometheus.states().items() if state == "firing"}
        assert firing == {"LlavaRayEngineFailed"}  # others wait for minutes
        check_variables(prometheus)
        [group] = prometheus.get("rules")["groups"]
        assert {rule["name"]: rule["lastError"] for rule in group["rules"] if "lastError" in rule} == {}
        assert {rule["health"] for rule in group["rules"]} == {"ok"}


def check_variables(prometheus: Prometheus) -> None:
    """Check that the dashboard offers this application and its models."""
    for name, expected in (("job", {"llava_ray"}), ("model_name", {"tiny", "broken"})):
        [(selector, label)] = re.findall(r"^label_values\((.*), (\w+)\)$", VARIABLES[name]["definition"])
        series = prometheus.get("series", **{"match[]": selector.replace("$job", ".*")})
        assert {one[label] for one in series} == expected


@needs_prometheus
@pytest.mark.slow
def test_a_service_that_is_gone_is_an_alert(tmp_path: Path) -> None:
    settings = ServeSettings.parsed({"model": "echo@somewhere"})
    [source] = settings.sources
    replica = Replica(EchoEngine(), source, settings)
    keys = (ApiKey("all", digest(KEY)),)
    app = build_front(Front(LocalGateway({source: replica}), settings, keys))
    with served(app) as service, prometheus_of(service, tmp_path) as prometheus:
        until(lambda: prometheus.states() == {}, tmp_path / "log")
        (tmp_path / "key").write_text("another key of sixteen characters")  # as good as gone
        until(lambda: prometheus.states() == {"LlavaRayDown": "pending"}, tmp_path / "log")
    replica.decoder.close()


@needs_prometheus
@pytest.mark.slow
def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path) -> None:
    assert CASES.keys() == ALERTS.keys()
    tests = []
    for name, case in CASES.items():
        rule = ALERTS[name]
        said = {"summary": case["summary"], "description": rule["annotations"]["description"]}
        fired = {"exp_labels": case["labels"] | rule["labels"], "exp_annotations": said}
        tests += [unit_test(name, case["fires"], [fired]), unit_test(name, case["silent"], [])]
    (tmp_path / "tests.yml").write_text(
        yaml.safe_dump({"rule_files": [str(MONITORING / "alerts.yml")], "tests": tests})
    )
    promtool("test", "rules", tmp_path / "tests.yml")


def unit_test(name: str, samples: dict[str, str], expected: list[dict[str, Any]]) -> dict[str, Any]:
    """One of promtool's tests: an alert after half an hour of these samples."""
    return {
        "name": f"{name}, {'fires' if expected else 'silent'}",
        "interval": "1m",
        "input_series": [{"series": series, "values": values} for series, values in samples.items()],
        "alert_rule_test": [{"eval_time": "30m", "alertname": name, "exp_alerts": expected}],
    }


@needs_prometheus
@pytest.mark.slow
def test_promtool_takes_the_files() -> None:
    promtool("check", "config", MONITORING / "prometheus.yml")
    promtool("check", "rules", "--lint-fatal", MONITORING / "alerts.yml")


def promtool(*words: object) -> None:
    result = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_dashboards_panels_are_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    known = VARIABLES.keys() | {"__rate_interval", "__range"}
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [target["refId"] for target in panel["targets"]] == list("ABC")[: len(panel["targets"])]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= known
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels_of(target["expr"])


def labels_of(expression: str) -> set[str]:
    """Return the labels that an expression's series have."""
    [*grouped] = re.findall(r"by \(([\w, ]+)\)", expression)
    return set(", ".join(grouped).split(", ")) - {"le"} if grouped else {"job", "instance", "model_name", "engine"}


def test_the_dashboards_panels_lie_beside_each_other() -> None:
    taken: dict[tuple[int, int], int] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["id"]) == panel["id"], panel["title"]


def test_grafana_finds_source_and_dashboard() -> None:
    [source] = yaml.safe_load((MONITORING / "grafana/datasources/prometheus.yaml").read_text())["datasources"]
    configured = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == configured["global"]["scrape_interval"]
    assert source["type"] == VARIABLES["datasource"]["query"] == "prometheus"
    [provider] = yaml.safe_load((MONITORING / "grafana/dashboards/llava_ray.yaml").read_text())["providers"]
    assert provider["options"]["path"] == "/etc/grafana/provisioning/dashboards"


def test_alerts_name_settings_that_exist_and_are_on_the_page() -> None:
    settings = {spell_key(name, field) for name, field in ServeSettings.model_fields.items()}
    page = (ROOT / "docs/monitoring.md").read_text()
    codes = {"engine_failed", "internal_error"}
    for name, rule in ALERTS.items():
        named = re.findall(r"\b(?:engine\.)?[a-z]+(?:_[a-z]+)+\b", rule["annotations"]["description"])
        assert set(named) <= settings | codes, name
        assert re.search(rf"^\| `{name}` \| {rule['labels']['severity']} \|", page, re.MULTILINE), name
