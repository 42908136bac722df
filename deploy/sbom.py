#!/usr/bin/env python3
"""A bill of materials (CycloneDX 1.5, JSON) of what is linked into the server, from `cargo metadata` and Cargo.lock.

    cargo metadata --format-version 1 --locked | deploy/sbom.py Cargo.lock > sbom.json
    deploy/sbom.py --check sbom.json

What only tests use is left out. The same inputs make the same file, byte for byte. Standard library only.
"""
import hashlib
import json
import re
import sys
import tomllib
import uuid


def linked(metadata):
    """Ids of the packages that are built into the root package, and of each its own dependencies."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    wanted = lambda dep: any(kind["kind"] != "dev" for kind in dep["dep_kinds"])
    found, todo = {}, [metadata["resolve"]["root"]]
    while todo:
        package = todo.pop()
        if package not in found:
            found[package] = sorted({dep["pkg"] for dep in nodes[package]["deps"] if wanted(dep)})
            todo.extend(found[package])
    return found


def purl(package):
    return f"pkg:cargo/{package['name']}@{package['version'].replace('+', '%2B')}"


def component(package, checksums, kind):
    out = {
        "type": kind,
        "bom-ref": purl(package),
        "name": package["name"],
        "version": package["version"],
        "purl": purl(package),
    }
    if package.get("description"):
        out["description"] = " ".join(package["description"].split())
    if package.get("license"):
        out["licenses"] = [{"expression": re.sub(r"\s*/\s*", " OR ", package["license"])}]
    checksum = checksums.get((package["name"], package["version"]))
    if checksum:
        out["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if (package.get("repository") or "").startswith("https://"):
        out["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return out


def bill(metadata, lock):
    packages = {package["id"]: package for package in metadata["packages"]}
    checksums = {(p["name"], p["version"]): p.get("checksum") for p in lock["package"]}
    graph = linked(metadata)
    root = metadata["resolve"]["root"]
    ref = lambda package: purl(packages[package])
    others = sorted((package for package in graph if package != root), key=ref)
    out = {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": component(packages[root], checksums, "application")},
        "components": [component(packages[package], checksums, "library") for package in others],
        "dependencies": [{"ref": ref(p), "dependsOn": sorted(map(ref, graph[p]))} for p in sorted(graph, key=ref)],
    }
    digest = hashlib.sha256(json.dumps(out, sort_keys=True).encode()).hexdigest()
    out["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, 'deltaserve/' + digest)}"
    return out


def check(bom):
    """What a reader of the format relies on; the problems found."""
    problems = []
    if (bom.get("bomFormat"), bom.get("specVersion")) != ("CycloneDX", "1.5"):
        problems.append("is not CycloneDX 1.5")
    if not re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bom.get("serialNumber", "")):
        problems.append("serialNumber is no UUID")
    components = bom.get("components", []) + [bom["metadata"]["component"]]
    refs = [c["bom-ref"] for c in components]
    if len(set(refs)) != len(refs):
        problems.append("a bom-ref is there twice")
    for c in components:
        if not c["name"] or not c["version"] or c["type"] not in ("library", "application"):
            problems.append(f"{c['bom-ref']} is incomplete")
        if c["type"] == "library" and not re.fullmatch(r"[0-9a-f]{64}", c.get("hashes", [{}])[0].get("content", "")):
            problems.append(f"{c['bom-ref']} has no digest")
        if not c.get("licenses"):
            problems.append(f"{c['bom-ref']} has no licence")
    if sorted(d["ref"] for d in bom.get("dependencies", [])) != sorted(refs):
        problems.append("dependencies are not those of all components")
    for d in bom.get("dependencies", []):
        problems.extend(f"{d['ref']} needs {n}, which is not listed" for n in d["dependsOn"] if n not in refs)
    if len(components) < 100 or not any(c["name"] == "tonic" for c in components):
        problems.append("components are missing")
    return problems


def main():
    if sys.argv[1:2] == ["--check"]:
        with open(sys.argv[2]) as file:
            problems = check(json.load(file))
        sys.exit("\n".join(problems) if problems else None)
    with open(sys.argv[1], "rb") as file:
        lock = tomllib.load(file)
    json.dump(bill(json.load(sys.stdin), lock), sys.stdout, indent=1, ensure_ascii=False)
    print()


if __name__ == "__main__":
    main()
