"""Print how much an install would download: `python download_size.py EXTRA,… PIP_ARGUMENTS…`.

EXTRA names an extra of pyproject.toml, whose requirements are added to pip's arguments.
"""

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def size_bytes(url: str) -> int:
    if url.startswith("file:"):
        path = Path(urllib.request.url2pathname(urllib.parse.urlparse(url).path))
        return path.stat().st_size if path.is_file() else 0
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as reply:
        return int(reply.headers.get("Content-Length", 0))


def requirements_of(extra: str) -> list[str]:
    text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    (listing,) = re.findall(rf"^{extra} = \[(.*?)\]", section, re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', listing)


def main() -> None:
    wanted = [r for extra in sys.argv[1].split(",") for r in requirements_of(extra)]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
    command += [*sys.argv[2:], *wanted]
    report = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    packages = json.loads(report.stdout)["install"]
    if not packages:
        return
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda p: size_bytes(p["download_info"]["url"]), packages))
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    print(
        f"to download: {sum(sizes) / 1e6:,.0f} MB in {len(sizes)} packages "
        f"(largest: {packages[largest]['metadata']['name']}, {sizes[largest] / 1e6:,.0f} MB)",
        flush=True,
    )


if __name__ == "__main__":
    main()
