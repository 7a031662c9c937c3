#!/usr/bin/env python3
"""Style as a test: formatting, lengths, include direction, self-contained headers, thread safety.

Prints one line per finding and exits 1 if there is any. Run by `./dev check`.
"""
import os
import re
import subprocess
import sys

import check_compile

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
MAX_KERNEL_LINES = 120
MAX_COLUMNS = 100

# What each folder may include (the direction of ARCHITECTURE.md). Longest prefix wins.
MAY_INCLUDE = {
    "proto": {"proto"},
    "model": {"model"},
    "kernels": {"model", "kernels"},
    "worker/link": {"proto", "worker/link"},
    "worker/link/nccl": {"proto", "model", "worker/link", "worker/link/nccl",
                         "worker/link/nccl/cuda"},
    "worker/link/nccl/cuda": {"model", "kernels", "worker/link/nccl", "worker/link/nccl/cuda"},
    "worker": {"proto", "model", "kernels", "worker/link", "worker/link/nccl", "worker"},
    "coordinator": {"proto", "model", "kernels", "worker/link", "coordinator"},
    "tools": {"proto", "model", "kernels", "worker/link", "worker/link/nccl", "worker", "coordinator",
              "tools"},
    "tests": {"proto", "model", "kernels", "worker/link", "worker/link/nccl", "worker",
              "coordinator", "tools", "tests"},
}
# The only places that may include gRPC or CUDA headers.
GRPC_FILES = re.compile(
    r"(worker/link/(grpc|hop_bench|link_test)|worker/control_client|worker/main"
    r"|coordinator/(.*service|request_stream|coordinator|main)|tools/|tests/)")
CUDA_FILES = re.compile(r"(kernels/cuda/|worker/link/nccl)")
# Tests beside the code, and their fixtures, may reach across folders.
TEST_FILES = re.compile(r".*_(test|fixture|fuzz)\.(cc|h)$")
INCLUDE = re.compile(r'^\s*#\s*include\s+(["<])([^">]+)[">]')


def tracked(*patterns):
    out = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard",
                          *patterns], check=True, capture_output=True, text=True).stdout
    return [f for f in out.split("\n") if f and os.path.exists(f)]


def folder_of(path):
    for prefix in sorted(MAY_INCLUDE, key=len, reverse=True):
        if path.startswith(prefix + "/"):
            return prefix
    return None


def check_includes(path, lines):
    here = folder_of(path)
    for number, line in enumerate(lines, 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        target = match.group(2)
        there = folder_of(target)
        if match.group(1) == '"' and there and here and there not in MAY_INCLUDE[here] and \
                not TEST_FILES.match(path):
            yield f"{path}:{number}: {here}/ must not include {target}"
        if re.match(r"(grpcpp/|grpc/|.*\.grpc\.pb\.h)", target) and not GRPC_FILES.match(path):
            yield f"{path}:{number}: gRPC belongs in transports, services and mains, not here"
        if re.match(r"(cuda|nccl)", target) and not CUDA_FILES.match(path):
            yield f"{path}:{number}: CUDA belongs in kernels/cuda and the NCCL transport"


def check_lengths(path, lines):
    if len(lines) > MAX_FILE_LINES:
        yield f"{path}: {len(lines)} lines, at most {MAX_FILE_LINES}"
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            yield f"{path}:{number}: {len(line)} columns, at most {MAX_COLUMNS}"
    limit = MAX_KERNEL_LINES if path.startswith("kernels/") else MAX_FUNCTION_LINES
    yield from check_functions(path, lines, limit)


def check_functions(path, lines, limit):
    """clang-format puts a definition's closing brace in the column where its first line starts."""
    start = None
    for number, line in enumerate(lines, 1):
        if start is None:
            match = re.match(r"^( *)[A-Za-z_~][^;={]*\(", line)
            scope = re.match(r"^ *(class|struct|enum|union|namespace|extern|if|for|while|switch|"
                             r"return|else|do|case|using|typedef|static_assert)\b", line)
            if match and not scope and len(match.group(1)) <= 2:
                end = next((i for i in range(number - 1, min(number + 12, len(lines)))
                            if re.search(r"[;{}]\s*$", lines[i])), None)
                if end is not None and lines[end].rstrip().endswith("{"):
                    start = (number, len(match.group(1)))
        elif re.match(r"^ {%d}\}" % start[1], line):
            if number - start[0] + 1 > limit:
                yield (f"{path}:{start[0]}: function of {number - start[0] + 1} lines, "
                       f"at most {limit}")
            start = None


def main():
    sources = tracked("*.h", "*.cc", "*.cu", "*.cuh")
    findings = []
    for path in sources:
        lines = open(path, encoding="utf-8").read().split("\n")
        findings += list(check_includes(path, lines[:-1])) + list(check_lengths(path, lines[:-1]))
    formatted = subprocess.run(["clang-format-14", "--dry-run", "-Werror", *sources],
                               capture_output=True, text=True)
    findings += [l for l in formatted.stderr.split("\n") if "error:" in l]

    host = [s for s in sources if s.endswith((".h", ".cc")) and "/cuda/" not in s]
    findings += check_compile.check(host)

    for finding in findings:
        print(finding)
    print(f"check: {len(sources)} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
