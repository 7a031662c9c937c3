"""The compiling part of check_style.py: self-contained headers and clang's -Wthread-safety.

Every header is parsed before anything else, so that what it lacks is missed: by itself, or in the
source file that includes it first. Three things make this quick and change no verdict:
- Heavy headers from outside are parsed once (precompiled), for files that include them anyway.
- A header that its own source file includes first is checked there.
- What has passed is remembered in build/check, under a hash of the file, of all it includes, of the
  compiler and of the installed packages.
"""
import collections
import concurrent.futures
import functools
import hashlib
import os
import re
import subprocess
import tempfile

CACHE = "build/check"
GENERATED = "build/release/generated"
INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]', re.MULTILINE)
# Headers worth precompiling: each takes more than a tenth of a second.
HEAVY = ["gmock/gmock.h", "gtest/gtest.h", "absl/status/statusor.h", "absl/synchronization/mutex.h",
         "fmt/format.h", "CLI/CLI.hpp", "nlohmann/json.hpp", "spdlog/spdlog.h", "grpcpp/grpcpp.h",
         "grpcpp/server_builder.h", "google/protobuf/message.h", "algorithm", "functional",
         "memory", "string", "vector", "thread", "filesystem", "random", "regex", "fstream"]
LEAST_USERS = 3  # of one set of heavy headers, for it to be precompiled

CLANG = ["clang++-14", "-std=c++20", "-I.", "-isystem", GENERATED,
         "-DSTAGECOACH_SOURCE_DIR=\".\"", "-DSTAGECOACH_BIN_DIR=\".\"", "-Wall", "-Wextra",
         "-Werror", "-Wthread-safety", "-Wno-missing-field-initializers",
         "-Wno-pragma-once-outside-header", "-Wno-unused-command-line-argument"]


@functools.lru_cache(None)
def read(path):
    with open(path, "rb") as file:
        return file.read()


@functools.lru_cache(None)
def includes(path):
    """([files of ours and generated ones], [names of others]) that `path` names, in order."""
    ours, others = [], []
    for _, name in INCLUDE.findall(read(path).decode()):
        place = next((p for p in (name, f"{GENERATED}/{name}") if os.path.isfile(p)), None)
        ours.append(place) if place else others.append(name)
    return ours, others


@functools.lru_cache(None)
def closure(path):
    """(files of ours, names of others) that `path` includes, directly or not."""
    files, names, todo = set(), set(), [path]
    while todo:
        file = todo.pop()
        if file not in files:
            files.add(file)
            ours, others = includes(file)
            todo += ours
            names.update(others)
    return frozenset(files), frozenset(names)


def vector_flags(path):
    """Of files for one instruction set."""
    if "avx512" in path:
        return ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
    return ["-mavx2", "-mfma", "-mf16c"] if "avx2" in path else []


def language(path):
    return (["-x", "c++"] if path.endswith(".h") else []) + vector_flags(path)


def own_header(path, headers):
    """The header that a source file includes before anything else, if it is its own."""
    header = re.sub(r"(_test)?\.cc$", ".h", path)
    first = INCLUDE.search(read(path).decode())
    return header if header in headers and first and first.group(2) == header else None


def heavy(path):
    names = closure(path)[1]
    return tuple(name for name in HEAVY if name in names)


def sets_to_precompile(wanted):
    """Of {path: heavy headers}, the sets that enough files have; the others get a part of theirs."""
    counts = collections.Counter(wanted.values())
    kept = [s for s, users in counts.items() if users >= LEAST_USERS and s]
    chosen = {}
    for path, names in wanted.items():
        fitting = [s for s in kept if set(s) <= set(names)]
        chosen[path] = max(fitting, key=len, default=())
    return chosen


def run(args):
    result = subprocess.run(args, capture_output=True, text=True)
    return None if result.returncode == 0 else (result.stderr.strip() or f"{args}: failed")


def precompile(names, folder):
    stem = f"{folder}/{hashlib.sha256(' '.join(names).encode()).hexdigest()[:16]}"
    with open(f"{stem}.h", "w", encoding="utf-8") as file:
        file.writelines(f"#include <{name}>\n" for name in names)
    failure = run([*CLANG, "-x", "c++-header", f"{stem}.h", "-o", f"{stem}.pch"])
    return None if failure else f"{stem}.pch"


def environment():
    """What decides verdicts besides our own files."""
    packages = subprocess.run(["dpkg-query", "-W"], capture_output=True, text=True).stdout
    version = subprocess.run([CLANG[0], "--version"], capture_output=True, text=True).stdout
    return (version + packages + " ".join(CLANG)).encode() + read(__file__)


def verdict_of(path, base):
    digest = hashlib.sha256(base + path.encode())
    for file in sorted(closure(path)[0]):
        digest.update(file.encode() + b"\0" + hashlib.sha256(read(file)).digest())
    return f"{CACHE}/{digest.hexdigest()}"


def check(sources):
    """Findings of all headers and sources; `sources` are the host compiler's, .h and .cc."""
    os.makedirs(CACHE, exist_ok=True)
    headers = {s for s in sources if s.endswith(".h")}
    first = {s: own_header(s, headers) for s in sources if s.endswith(".cc")}
    rest = headers - set(first.values())
    base = environment()
    verdicts = {path: verdict_of(path, base) for path in [*first, *sorted(rest)]}
    todo = [path for path, verdict in verdicts.items() if not os.path.exists(verdict)]
    # A header must not be given what only the source file behind it includes.
    wanted = {path: heavy(first.get(path) or path) for path in todo if not vector_flags(path)}
    chosen = sets_to_precompile(wanted)
    findings = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, \
            tempfile.TemporaryDirectory() as folder:
        used = sorted(set(chosen.values()) - {()})
        precompiled = dict(zip(used, pool.map(lambda names: precompile(names, folder), used)))

        def compile_one(path):
            pch = precompiled.get(chosen.get(path, ()))
            with_pch = ["-include-pch", pch] if pch else []
            return path, run([*CLANG, "-fsyntax-only", *with_pch, *language(path), path])

        for path, failure in pool.map(compile_one, todo):
            if failure:
                findings.append(failure)
            else:
                open(verdicts[path], "w", encoding="utf-8").close()
    for old in set(os.listdir(CACHE)) - {os.path.basename(verdict) for verdict in verdicts.values()}:
        os.remove(f"{CACHE}/{old}")
    return findings
