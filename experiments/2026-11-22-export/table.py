"""Rows of zoo.csv from the reports of pytest: python table.py REPORT.xml… > zoo.csv."""

import csv
import sys
from xml.etree import ElementTree

COLUMNS = ("bytes", "images", "difference", "share", "agreement", "latency")
writer = csv.writer(sys.stdout, lineterminator="\n")
writer.writerow(("network", "format", "quantize", *COLUMNS))
for path in sys.argv[1:]:
    for case in ElementTree.parse(path).iter("testcase"):
        found = {each.get("name"): each.get("value") for each in case.iter("property")}
        if found and case.find("failure") is None:
            network, format, quantize = case.get("name").split("[")[1].rstrip("]").split("-")
            row = ("" if found.get(key) in (None, "None") else found[key] for key in COLUMNS)
            writer.writerow((network, format, quantize, *row))
