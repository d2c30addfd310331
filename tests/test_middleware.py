"""What Fast DDS is told, and what it leaves."""

from __future__ import annotations

from depthlm_ros.middleware import release_shared_memory


def test_the_segments_of_this_process_are_freed_and_no_others(tmp_path):
    shared, files = tmp_path / "shm", tmp_path / "fd"
    shared.mkdir()
    files.mkdir()
    for name in ("0123abcd", "ffff0000", "port7411"):
        (shared / f"fastdds_{name}").write_text("segment")
        (shared / f"fastdds_{name}_el").touch()
    # This process holds the first one's lock, and reads the second.
    held = ("fastdds_0123abcd_el", "fastdds_ffff0000", "fastdds_port7411_el", "gone")
    for number, name in enumerate(held):
        (files / str(number)).symlink_to(shared / name)
    (files / "9").write_text("no link")
    release_shared_memory(files)
    left = {"fastdds_ffff0000", "fastdds_ffff0000_el", "fastdds_port7411", "fastdds_port7411_el"}
    assert {path.name for path in shared.iterdir()} == left
    release_shared_memory(tmp_path / "no such system")
