"""What Fast DDS is told, and what it leaves."""

from __future__ import annotations

from depthlm_ros.middleware import release_shared_memory


def test_the_segments_of_this_process_are_freed_and_no_others(tmp_path):
    shared, files, told = tmp_path / "shm", tmp_path / "fd", tmp_path / "fdinfo"
    for folder in (shared, files, told):
        folder.mkdir()
    for name in ("0123abcd", "ffff0000", "55aa55aa", "port7411"):
        (shared / f"fastdds_{name}").write_text("segment")
        (shared / f"fastdds_{name}_el").touch()
    # This process holds the first one's lock, reads the second, and looks whether the third is in use.
    held = ("fastdds_0123abcd_el", "fastdds_ffff0000", "fastdds_55aa55aa_el", "fastdds_port7411_el", "gone")
    for number, name in enumerate(held):
        (files / str(number)).symlink_to(shared / name)
        lock = "" if "55aa" in name else "lock:\t1: FLOCK  ADVISORY  WRITE 4711 00:19:61 0 EOF\n"
        (told / str(number)).write_text(f"pos:\t0\nflags:\t0100002\n{lock}")
    (files / "9").write_text("no link")
    release_shared_memory(files)
    left = {f"fastdds_{name}{end}" for name in ("ffff0000", "55aa55aa", "port7411") for end in ("", "_el")}
    assert {path.name for path in shared.iterdir()} == left
    release_shared_memory(tmp_path / "no such system")
