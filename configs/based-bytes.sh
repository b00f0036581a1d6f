#!/usr/bin/env bash
# Makes what based-bytes.yaml trains on, in data/: configs/based-bytes.sh [Python-3.13.5.tar.xz]
#
#     data/python/        Lib/ and Doc/ of CPython 3.13.5 (PSF License Version 2), without tables of numbers and letters
#     data/held-out/      modules and pages that training never sees, nor the modules' tests
#     data/recall*.jsonl  documents that ask for what they said before
#
# Without an argument it fetches the release from python.org. Needs curl, tar, xz, and Python with `based`.
set -euo pipefail
cd "$(dirname "$0")/.."
release=Python-3.13.5
sha256=93e583f243454e6e9e4588ca2c2662206ad961659863277afcdb96801647d640
archive=${1:-data/$release.tar.xz}

mkdir -p data
[ -e "$archive" ] || curl -fL -o "$archive" "https://www.python.org/ftp/python/${release#Python-}/$release.tar.xz"
echo "$sha256  $archive" | sha256sum --check --quiet
rm -rf data/python data/held-out
mkdir -p data/python data/held-out/{Lib,Doc}
tar -xJf "$archive" -C data/python --strip-components=1 $release/Lib $release/Doc $release/LICENSE

cd data/python
for module in asyncio/queues bisect cmd configparser csv email/message fractions graphlib heapq http/cookies \
  json/encoder logging/config queue shlex textwrap timeit zipapp; do
  mv "Lib/$module.py" "../held-out/Lib/${module//\//.}.py"
done
for page in asyncio-queue bisect cmd configparser csv email.message fractions graphlib heapq http.cookies \
  json logging.config queue shlex textwrap timeit zipapp; do
  mv "Doc/library/$page.rst" ../held-out/Doc/
done
cp LICENSE ../held-out/
rm -r Lib/test/test_{bisect,cmd,configparser,csv,email/test_message,fractions,graphlib,heapq,http_cookies}.py \
  Lib/test/test_{logging,queue,shlex,textwrap,timeit,zipapp}.py Lib/test/test_json Lib/test/test_asyncio/test_queues.py
# Tables; the documentation's text once more; files that are wrong on purpose.
rm Lib/encodings/{*[0-9]*,mac_*[a-z]}.py Lib/pydoc_data/topics.py
rm -r Lib/test/{encoded_modules,tokenizedata,cjkencodings}
cd ../..
python -m based.models.pairs 500000 > data/recall.jsonl
head -n 150000 data/recall.jsonl > data/recall-anneal.jsonl
