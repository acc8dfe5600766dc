"""Does the file that a sample says it is from exist upstream, by the manifest, and have so many records?"""

from collections.abc import Iterator

from validators.findings import Finding, error
from validators.manifest import Manifest
from validators.samples import Record


class Origins:
    """The annotation files that a build goes back to, its own and those of the builds that it draws from."""

    def __init__(self, manifest: Manifest) -> None:
        self._records: dict[tuple[str, str], int | None] = {}  # None if an earlier build read it, and knows how many
        for build in manifest.builds.values():
            for source, files in build.sources.items():
                self._records |= dict.fromkeys(((source, file) for file in files), None)
        for name, read in manifest.sources.items():
            self._records |= {(name, file.file): file.records for file in read.files}

    def check(self, record: Record, *, file: str, key: str) -> Iterator[Finding]:
        """Checks where one sample says it is from."""
        place = (record.source, record.provenance.file)
        if place not in self._records:
            yield error("sample-provenance", f"the manifest knows no file {'/'.join(place)}", file=file, key=key)
            return
        records, ordinal = self._records[place], record.provenance.ordinal
        if records is not None and ordinal >= records:
            detail = f"it should be record {ordinal} of {'/'.join(place)}, which has {records}"
            yield error("sample-provenance", detail, file=file, key=key)
