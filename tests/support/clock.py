"""A server's wall clock, to be stepped: a library that is loaded before all others adds to what the system says."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Self

_SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long *offset_s;

__attribute__((constructor)) static void open_offset(void) {
    int file = open(getenv("STEPPED_CLOCK"), O_RDONLY);
    void *page = file < 0 ? MAP_FAILED : mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    offset_s = page == MAP_FAILED ? 0 : page;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int outcome = syscall(SYS_clock_gettime, clock, now);
    if (offset_s && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *offset_s;
    return outcome;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    int outcome = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return outcome;
}

time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now) *now = precise.tv_sec;
    return precise.tv_sec;
}
"""

COMPILER = shutil.which("cc")


class SteppedClock:
    """A clock for one server: give it `environment`, and step it as it runs. Needs a C compiler."""

    def __init__(self, directory: Path) -> None:
        """Build it in a folder of its own."""
        assert COMPILER, "no C compiler"
        source, library, offset = directory / "clock.c", directory / "clock.so", directory / "offset"
        source.write_text(_SOURCE)
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        offset.write_bytes(bytes(8))
        self.environment = {"LD_PRELOAD": str(library), "STEPPED_CLOCK": str(offset)}
        self._file = offset.open("r+b")
        self._page = mmap.mmap(self._file.fileno(), 8)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._page.close()
        self._file.close()

    def step(self, seconds: int) -> None:
        """Have the clock be off by so much from now on."""
        self._page[:8] = struct.pack("l", seconds)
