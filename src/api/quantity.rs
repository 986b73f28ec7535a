//! Kubernetes quantities as exact numbers: `1Gi`, `1024Mi` and `1073741824` are the same.

/// Units per one: quantities go down to nano.
const NANOS: i128 = 1_000_000_000;

/// The quantity in billionths, or `None` if the text is no quantity.
pub fn nanos(text: &str) -> Option<i128> {
    let digits =
        text.find(|c: char| !c.is_ascii_digit() && !matches!(c, '.' | '+' | '-')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor = factor(suffix)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let negative = whole.starts_with('-');
    let whole = whole.strip_prefix(['+', '-']).unwrap_or(whole);
    let plain = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !plain(whole) || !plain(fraction) || fraction.len() > 9 {
        return None;
    }
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let part: i128 = format!("{fraction:0<9}").parse().ok()?;
    let value = whole.checked_mul(NANOS)?.checked_add(part)?;
    // `factor` is in billionths too, so that the division comes last and nothing is lost.
    let value = value.checked_mul(factor)?.checked_div(NANOS)?;
    Some(if negative { -value } else { value })
}

/// The quantity in whole units (bytes), rounded up; `None` if it is no quantity or negative.
pub fn units(text: &str) -> Option<u64> {
    let nanos = nanos(text).filter(|n| *n >= 0)?;
    u64::try_from(nanos.checked_add(NANOS - 1)? / NANOS).ok()
}

fn factor(suffix: &str) -> Option<i128> {
    let binary = |power: u32| Some(NANOS << (10 * power));
    let decimal = |power: i32| {
        let scale = 10_i128.checked_pow(power.unsigned_abs())?;
        if power >= 0 { NANOS.checked_mul(scale) } else { NANOS.checked_div(scale) }
    };
    match suffix {
        "" => decimal(0),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        exponent => decimal(exponent.strip_prefix(['e', 'E'])?.parse().ok()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_amount_in_other_words_is_the_same_number() {
        for (one, other) in [
            ("1Gi", "1024Mi"),
            ("1Gi", "1073741824"),
            ("1.5Gi", "1536Mi"),
            ("500m", "0.5"),
            ("2", "2000m"),
            ("1e3", "1k"),
            ("1E3", "1000"),
            (".5", "500m"),
        ] {
            assert_eq!(nanos(one), nanos(other), "{one} {other}");
            assert!(nanos(one).is_some(), "{one}");
        }
        assert_ne!(nanos("1Gi"), nanos("1G"));
        assert_eq!(units("64Mi"), Some(64 << 20));
        assert_eq!(units("1500m"), Some(2));
    }

    #[test]
    fn what_is_no_quantity_is_none() {
        for text in
            ["", "Gi", "1gi", "one", "1 Gi", "1.2.3", "--1", "1e", "9999999999999999999999999999Ei", "ä"]
        {
            assert_eq!(nanos(text), None, "{text}");
        }
        assert_eq!(units("-1"), None);
    }
}
