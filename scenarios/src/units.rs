//! Sizes and durations as people type them.

use std::time::Duration;

/// Bytes: a whole number with an optional suffix `k`, `M`, `G` or `T` (powers of 1024), and an optional `iB` or `B`.
///
/// # Errors
/// A sentence that says what was wrong and what would be right.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let (number, suffix) = split(text);
    let unit = match suffix.trim_end_matches("iB").trim_end_matches('B') {
        "" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        _ => return Err(format!("'{text}' is not a size: write bytes, or a number with k, M, G or T, such as 256M")),
    };
    let number: u64 =
        number.parse().map_err(|_| format!("'{text}' is not a size: it needs a whole number, such as 256M"))?;
    number.checked_mul(unit).ok_or_else(|| format!("'{text}' is more than a 64-bit size can hold"))
}

/// A size of at most 4 GiB, for what the kernel keeps in 32 bits.
///
/// # Errors
/// As [`parse_bytes`].
pub fn parse_bytes_u32(text: &str) -> Result<u32, String> {
    u32::try_from(parse_bytes(text)?).map_err(|_| format!("'{text}' is too large here: at most 4 GiB less one byte"))
}

/// A duration: a whole number with a suffix `ms`, `s`, `m` or `h`; seconds without one.
///
/// # Errors
/// A sentence that says what was wrong and what would be right.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, suffix) = split(text);
    let unit_ms: u64 = match suffix {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => {
            return Err(format!("'{text}' is not a duration: write a number with ms, s, m or h, such as 30s or 10m"));
        }
    };
    let number: u64 =
        number.parse().map_err(|_| format!("'{text}' is not a duration: it needs a whole number, such as 30s"))?;
    number
        .checked_mul(unit_ms)
        .map(Duration::from_millis)
        .ok_or_else(|| format!("'{text}' is longer than can be waited"))
}

/// Bytes for a reader: in the largest unit that divides them.
#[must_use]
pub fn format_bytes(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes != 0 && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} bytes")
}

/// Bytes for a reader who wants to know about how many: three digits or so.
#[must_use]
pub fn format_rounded(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >> shift > 0 {
            return format!("{:.1} {unit}", bytes as f64 / (1_u64 << shift) as f64);
        }
    }
    format!("{bytes} bytes")
}

fn split(text: &str) -> (&str, &str) {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_binary_suffixes() {
        assert_eq!(parse_bytes("512"), Ok(512));
        assert_eq!(parse_bytes("4k"), Ok(4096));
        assert_eq!(parse_bytes("256M"), Ok(256 << 20));
        assert_eq!(parse_bytes("1GiB"), Ok(1 << 30));
        assert_eq!(parse_bytes("2T"), Ok(2 << 40));
        assert_eq!(parse_bytes_u32("1M"), Ok(1 << 20));
    }

    #[test]
    fn what_is_no_size_says_what_would_be() {
        for wrong in ["", "M", "1.5G", "-1", "12X", "1 M", "99999999999T", "B12"] {
            let message = parse_bytes(wrong).expect_err(wrong);
            assert!(message.starts_with(&format!("'{wrong}' is")), "{message}");
        }
        assert!(parse_bytes_u32("4G").is_err());
    }

    #[test]
    fn durations_take_suffixes_and_seconds_without_one() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        for wrong in ["", "s", "1d", "1.5s", "-3s", "99999999999999999h"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn bytes_read_in_the_largest_whole_unit() {
        assert_eq!(format_bytes(0), "0 bytes");
        assert_eq!(format_bytes(1000), "1000 bytes");
        assert_eq!(format_bytes(4096), "4 KiB");
        assert_eq!(format_bytes(3 << 30), "3 GiB");
        assert_eq!(format_rounded((3 << 30) + (1 << 29)), "3.5 GiB");
        assert_eq!(format_rounded(17), "17 bytes");
    }
}
