"""The memory that is available, under the limit of the group of this process."""

from ks.files import memory


def test_the_memory_that_is_left_in_the_group_is_the_limit_if_it_is_the_smallest(monkeypatch):
    monkeypatch.setattr(memory, "memory_left", lambda: [2**60])
    assert 0 < memory.available_bytes() < 2**60
    monkeypatch.setattr(memory, "memory_left", lambda: [2**60, 5_000, 7_000])
    assert memory.available_bytes() == 5_000
    monkeypatch.setattr(memory, "memory_left", lambda: [-1])
    assert memory.available_bytes() == 0
