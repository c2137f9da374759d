"""Whatever comes over HTTP is answered, or refused with an error object: mutated requests through the whole front."""

import functools

import pytest
from fuzzing import NUM_INPUTS, NUM_PROOF_INPUTS, fuzz, fuzz_at_length
from request_fuzzing import make_target
from route_mutations import make_route_request

make_route_target = functools.partial(make_target, make_route_request)


@pytest.mark.slow
def test_mutated_requests() -> None:
    report = fuzz("requests", make_target, NUM_INPUTS)
    assert not report.faults
    assert report.num_inputs == NUM_INPUTS
    assert sum(count for word, count in report.outcomes.items() if word.startswith("200")) > NUM_INPUTS / 10


@pytest.mark.verify
@pytest.mark.timeout(7200)
def test_many_mutated_requests() -> None:
    report = fuzz_at_length("requests", make_target)
    assert not report.faults
    assert report.num_inputs == NUM_PROOF_INPUTS


@pytest.mark.slow
def test_mutated_requests_to_other_routes() -> None:
    report = fuzz("other routes", make_route_target, NUM_INPUTS)
    assert not report.faults
    assert sum(count for word, count in report.outcomes.items() if word.startswith("200")) > NUM_INPUTS / 10


@pytest.mark.verify
@pytest.mark.timeout(7200)
def test_many_mutated_requests_to_other_routes() -> None:
    report = fuzz_at_length("other_routes", make_route_target)
    assert not report.faults
    assert report.num_inputs == NUM_PROOF_INPUTS
