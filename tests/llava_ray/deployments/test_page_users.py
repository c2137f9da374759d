"""Sessions of the page where users log in: what one user's session holds is not given to another."""

from collections.abc import Iterator

import pytest
from page_client import KEY_OF_BOB, PageClient, build_page
from serving import served

from llava_ray.deployments.chat_page.sessions import MAX_OWNERS, SessionOwners
from llava_ray.deployments.http.auth import ANYBODY, ApiKey
from llava_ray.deployments.refusal import RefusalError

ALICE, BOB = ApiKey("alice", "a" * 64), ApiKey("bob", "b" * 64)
SAID = [{"role": "user", "content": "what alice said"}]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        app, _ = build_page(keys=True)
        with served(app) as place:
            yield place


@pytest.mark.slow
def test_another_user_cannot_read_cancel_or_use_a_session(address: str) -> None:
    alice, bob = PageClient(address), PageClient(address, local_address="127.0.0.2")
    assert (alice.log_in().status_code, bob.log_in("bob", KEY_OF_BOB).status_code) == (200, 200)
    number = alice.number_of("undo")
    event = alice.join(number, [SAID]).json()["event_id"]
    bob.session = alice.session
    cancel = {"session_hash": alice.session, "fn_index": number, "event_id": event}
    answers = [
        bob.http.get("/gradio_api/queue/data", params={"session_hash": alice.session}),
        bob.http.get(f"/gradio_api/queue/data?session_hash=mine&session_hash={alice.session}"),
        bob.http.get(f"/gradio_api/queue/data?session%5fhash={alice.session}"),
        bob.http.get(f"/gradio_api/heartbeat/{alice.session}"),
        bob.http.post("/gradio_api/cancel", json=cancel),
        bob.join(number, [SAID]),
    ]
    assert [answer.json()["error"]["code"] for answer in answers] == ["page_session"] * 6
    assert "what alice said" in str(alice.outcome())
    assert alice.http.post("/gradio_api/cancel", json=cancel).status_code == 200


@pytest.mark.slow
def test_a_cancel_names_what_it_ends(address: str) -> None:
    alice = PageClient(address)
    alice.log_in()
    for body in (b"", b"[]", b"{}", b'{"session_hash": ["x"], "fn_index": 1, "event_id": "x"}'):
        response = alice.http.post("/gradio_api/cancel", content=body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "page_event")


def test_without_keys_a_session_is_whose_name_is_known() -> None:
    owners = SessionOwners()
    owners.claim("s", ANYBODY)
    assert owners.owners == {}


def test_few_sessions_are_remembered_and_those_in_use_the_longest() -> None:
    owners = SessionOwners()
    owners.claim("first", ALICE)
    for number in range(MAX_OWNERS - 1):
        owners.claim(f"s{number}", BOB)
    with pytest.raises(RefusalError):
        owners.claim("first", BOB)
    owners.claim("one more", BOB)
    assert len(owners.owners) == MAX_OWNERS
    with pytest.raises(RefusalError):
        owners.claim("first", BOB)
    owners.claim("s0", ALICE)  # forgotten
