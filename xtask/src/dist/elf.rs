//! What a Linux program asks of the system that it is started on: its machine, libraries and versions of their symbols.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};

const SECTION_SYMBOLS: u32 = 2;
const SECTION_DYNAMIC: u32 = 6;
/// Versions that the program needs of the symbols of its libraries.
const SECTION_NEEDED: u32 = 0x6fff_fffe;
const TAG_LIBRARY: u64 = 1;

/// What a program needs.
#[derive(Debug)]
pub(crate) struct Needs {
    /// As wheels name it: `x86_64`, `aarch64`.
    pub(crate) machine: &'static str,
    /// Libraries by the name that the loader looks for.
    pub(crate) libraries: BTreeSet<String>,
    /// The newest `GLIBC_MAJOR.MINOR` of any symbol.
    pub(crate) glibc: (u32, u32),
}

/// True if `strip` would find something.
pub(crate) fn has_symbols(program: &[u8]) -> Result<bool> {
    Ok(sections(&Bytes(program))?.iter().any(|section| section.kind == SECTION_SYMBOLS))
}

struct Bytes<'b>(&'b [u8]);

impl Bytes<'_> {
    fn take<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let end = at.checked_add(N).context("an offset of the program overflows")?;
        let bytes = self.0.get(at..end).with_context(|| format!("the program ends before byte {end}"))?;
        Ok(bytes.try_into()?)
    }

    fn u16(&self, at: usize) -> Result<u16> {
        Ok(u16::from_le_bytes(self.take(at)?))
    }

    fn u32(&self, at: usize) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(at)?))
    }

    fn u64(&self, at: usize) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(at)?))
    }

    fn offset(&self, at: usize) -> Result<usize> {
        Ok(usize::try_from(self.u64(at)?)?)
    }

    fn text(&self, at: usize) -> Result<String> {
        let rest = self.0.get(at..).context("a name lies behind the end of the program")?;
        let end = rest.iter().position(|b| *b == 0).context("a name has no end")?;
        Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
    }
}

struct Section {
    kind: u32,
    offset: usize,
    size: usize,
    link: usize,
    entries: u32,
}

fn sections(b: &Bytes) -> Result<Vec<Section>> {
    if b.0.get(..6) != Some(b"\x7fELF\x02\x01".as_slice()) {
        bail!("no 64-bit ELF program of a little-endian machine");
    }
    let (table, size, count) = (b.offset(40)?, usize::from(b.u16(58)?), usize::from(b.u16(60)?));
    let section = |i: usize| -> Result<Section> {
        let at = table.checked_add(i * size).context("the table of sections overflows")?;
        Ok(Section {
            kind: b.u32(at + 4)?,
            offset: b.offset(at + 24)?,
            size: b.offset(at + 32)?,
            link: b.u32(at + 40)? as usize,
            entries: b.u32(at + 44)?,
        })
    };
    (0..count).map(section).collect()
}

/// Reads a 64-bit little-endian ELF program.
pub(crate) fn needs(program: &[u8]) -> Result<Needs> {
    let b = Bytes(program);
    let sections = sections(&b)?;
    let machine = match b.u16(18)? {
        62 => "x86_64",
        183 => "aarch64",
        other => bail!("ELF machine {other} has no name here"),
    };
    let mut needs = Needs { machine, libraries: BTreeSet::new(), glibc: (0, 0) };
    for section in &sections {
        let texts =
            || Ok::<usize, anyhow::Error>(sections.get(section.link).context("no table of names")?.offset);
        match section.kind {
            SECTION_DYNAMIC => {
                for at in (section.offset..section.offset + section.size).step_by(16) {
                    if b.u64(at)? == TAG_LIBRARY {
                        needs.libraries.insert(b.text(texts()? + b.offset(at + 8)?)?);
                    }
                }
            }
            SECTION_NEEDED => {
                let mut at = section.offset;
                for _ in 0..section.entries {
                    let (versions, first, next) =
                        (b.u16(at + 2)?, b.u32(at + 8)? as usize, b.u32(at + 12)? as usize);
                    let mut version = at + first;
                    for _ in 0..versions {
                        let name = b.text(texts()? + b.u32(version + 8)? as usize)?;
                        needs.glibc = needs.glibc.max(glibc(&name).unwrap_or_default());
                        version += b.u32(version + 12)? as usize;
                    }
                    at += next;
                }
            }
            _ => {}
        }
    }
    Ok(needs)
}

/// `GLIBC_2.34` → (2, 34).
fn glibc(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.strip_prefix("GLIBC_")?.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

/// The platform that a wheel with this program may claim: every glibc from this version on.
pub(crate) fn platform(needs: &Needs) -> Result<String> {
    // What every system that takes such wheels has.
    const EVERYWHERE: [&str; 8] = [
        "libc.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libpthread.so.0",
        "libdl.so.2",
        "librt.so.1",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    ];
    if let Some(library) = needs.libraries.iter().find(|l| !EVERYWHERE.contains(&l.as_str())) {
        bail!("the program needs `{library}`, which not every Linux has: no wheel may promise to run");
    }
    // The oldest that installers know by this rule.
    let (major, minor) = needs.glibc.max((2, 17));
    Ok(format!("manylinux_{major}_{minor}_{}", needs.machine))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn a_program_is_read_as_its_own_loader_reads_it() {
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let needs = needs(&program).unwrap();
        assert_eq!(needs.machine, std::env::consts::ARCH);
        assert!(needs.libraries.contains("libc.so.6"), "{needs:?}");
        // `std` starts threads, which needs at least this; and no glibc is this new.
        assert!(needs.glibc >= (2, 2) && needs.glibc < (3, 0), "{needs:?}");
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(glibc("GLIBC_2.9"), Some((2, 9)));
        assert!(glibc("GLIBC_2.28") > glibc("GLIBC_2.9"));
        assert_eq!(glibc("GLIBC_2.2.5"), Some((2, 2)));
        assert_eq!((glibc("GCC_3.0"), glibc("GLIBC_PRIVATE")), (None, None));
    }

    #[test]
    fn a_wheel_promises_what_the_program_needs() {
        let with = |libraries: &[&str], glibc| Needs {
            machine: "x86_64",
            libraries: libraries.iter().map(ToString::to_string).collect(),
            glibc,
        };
        assert_eq!(platform(&with(&["libc.so.6"], (2, 35))).unwrap(), "manylinux_2_35_x86_64");
        assert_eq!(platform(&with(&["libm.so.6"], (2, 4))).unwrap(), "manylinux_2_17_x86_64");
        let refused = platform(&with(&["libc.so.6", "libvulkan.so.1"], (2, 35))).unwrap_err();
        assert!(refused.to_string().contains("libvulkan.so.1"));
    }

    #[test]
    fn what_is_no_program_or_ends_early_is_refused() {
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(needs(b"#!/bin/sh\n").is_err());
        assert!(needs(&program[..60]).is_err());
        assert!(needs(&program[..program.len() / 2]).is_err());
    }
}
