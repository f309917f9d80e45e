//! Sizes and durations as people write them.

use std::time::Duration;

/// Bytes: a whole number with an optional suffix `k`, `M`, `G` or `T` (powers of 1024), and an optional `iB` or `B`.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, suffix) = split(text);
    let unit = match suffix.strip_suffix("iB").or_else(|| suffix.strip_suffix('B')).unwrap_or(suffix) {
        "" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        _ => return Err("write bytes, or a number with k, M, G or T, such as 256M".into()),
    };
    let number: u64 = number.parse().map_err(|_| "it needs a whole number, such as 256M".to_owned())?;
    number.checked_mul(unit).ok_or_else(|| "it is more than 64 bits can hold".to_owned())
}

/// As [`parse_bytes`], for what the kernel keeps in 32 bits.
pub(crate) fn parse_bytes_u32(text: &str) -> Result<u32, String> {
    u32::try_from(parse_bytes(text)?).map_err(|_| "it is too large: at most 4 GiB less one byte".to_owned())
}

/// A duration of at most a day: a whole number with a suffix `ms`, `s`, `m` or `h`; seconds without one.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, suffix) = split(text);
    let unit_ms = match suffix {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("write a number with ms, s, m or h, such as 30s".into()),
    };
    let number: u64 = number.parse().map_err(|_| "it needs a whole number, such as 30s".to_owned())?;
    // Bounded, because deadlines are made of it and every wait is to end.
    match number.checked_mul(unit_ms) {
        Some(ms) if ms <= 86_400_000 => Ok(Duration::from_millis(ms)),
        _ => Err("it is longer than a day".into()),
    }
}

/// Bytes for a reader: exact, in the largest unit that divides them.
pub(crate) fn format_bytes(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

fn split(text: &str) -> (&str, &str) {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [("512", 512), ("4k", 4096), ("256M", 256 << 20), ("1GiB", 1 << 30), ("2TB", 2 << 40)] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "1X", "1iBB", "99999999T", "0x10", " 1"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        assert!(parse_bytes_u32("4G").is_err());
        assert_eq!(parse_bytes_u32("4k"), Ok(4096));
    }

    #[test]
    fn durations_are_bounded() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("5"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("24h"), Ok(Duration::from_secs(86_400)));
        for text in ["", "s", "5d", "25h", "99999999999999999h", "-1s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_exactly() {
        assert_eq!(format_bytes(0), "0 B");
        assert_eq!(format_bytes(513), "513 B");
        assert_eq!(format_bytes(1536), "1536 B");
        assert_eq!(format_bytes(3 << 10), "3 KiB");
        assert_eq!(format_bytes(1 << 40), "1 TiB");
    }
}
