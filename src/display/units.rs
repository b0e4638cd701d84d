//! Numbers as a reader wants them: bytes in GB and GiB, thousands separated, few digits.

/// A pair of units for a column of bytes: decimal (as articles count) and binary (as cards are sold and reported).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteUnit {
    /// `GB`, `MB`, `kB` or `B`.
    pub decimal: &'static str,
    /// `GiB`, `MiB`, `KiB` or `B`.
    pub binary: &'static str,
    power: i32,
}

impl ByteUnit {
    /// The unit in which the largest of a column has at least one digit before the point.
    pub fn of(largest: u64) -> ByteUnit {
        match largest {
            1_000_000_000.. => ByteUnit { decimal: "GB", binary: "GiB", power: 3 },
            1_000_000.. => ByteUnit { decimal: "MB", binary: "MiB", power: 2 },
            1_000.. => ByteUnit { decimal: "kB", binary: "KiB", power: 1 },
            _ => ByteUnit { decimal: "B", binary: "B", power: 0 },
        }
    }

    /// `bytes` in the decimal unit, three digits after the point.
    pub fn decimal(&self, bytes: u64) -> String {
        self.text(bytes, 1000_f64)
    }

    /// `bytes` in the binary unit, three digits after the point.
    pub fn binary(&self, bytes: u64) -> String {
        self.text(bytes, 1024_f64)
    }

    fn text(&self, bytes: u64, base: f64) -> String {
        if self.power == 0 {
            return count(bytes);
        }
        let value = bytes as f64 / base.powi(self.power);
        if bytes > 0 && value < 0.0005 { "< 0.001".to_owned() } else { format!("{value:.3}") }
    }

    /// `bytes` as a number in the decimal unit, for a chart's axis.
    pub fn value(&self, bytes: u64) -> f64 {
        bytes as f64 / 1000_f64.powi(self.power)
    }
}

/// `4650301440` -> `4.650 GB (4.331 GiB)`.
pub fn bytes(n: u64) -> String {
    let unit = ByteUnit::of(n);
    if unit.power == 0 {
        return format!("{n} B");
    }
    format!("{} {} ({} {})", unit.decimal(n), unit.decimal, unit.binary(n), unit.binary)
}

/// `4650301440` -> `4.650 GB`.
pub fn short_bytes(n: u64) -> String {
    let unit = ByteUnit::of(n);
    format!("{} {}", unit.decimal(n), unit.decimal)
}

/// `7241732096` -> `7,241,732,096`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    out
}

/// `7241732096` -> `7.24 B`, for parameters; below a thousand as it is.
pub fn short_count(n: u64) -> String {
    match n {
        1_000_000_000.. => format!("{:.2} B", n as f64 / 1e9),
        1_000_000.. => format!("{:.2} M", n as f64 / 1e6),
        1_000.. => format!("{:.1} k", n as f64 / 1e3),
        _ => n.to_string(),
    }
}

/// A share of one as `12.3 %`.
pub fn percent(share: f64) -> String {
    if !share.is_finite() {
        return "-".to_owned();
    }
    if share > 0.0 && share < 0.0005 { "< 0.1 %".to_owned() } else { format!("{:.1} %", 100.0 * share) }
}

/// A number with `digits` significant digits: `0.0002`, `1.23e-7`, `3.142`, `1,234`.
pub fn number(x: f64, digits: usize) -> String {
    if !x.is_finite() {
        return x.to_string();
    }
    if x == 0.0 {
        return "0".to_owned();
    }
    let exponent = x.abs().log10().floor() as i32;
    if !(-4..9).contains(&exponent) {
        return format!("{x:.*e}", digits.saturating_sub(1));
    }
    let decimals = (digits as i32 - 1 - exponent).max(0) as usize;
    let text = format!("{x:.decimals$}");
    if exponent < 3 { text } else { separate(&text) }
}

/// A value that someone chose, as short as it can be written: `10,000`, `0.05`, `2e-5`.
pub fn plain(x: f64) -> String {
    let small = x != 0.0 && x.abs() < 1e-3;
    if small || !x.is_finite() || x.abs() >= 1e15 { format!("{x:e}") } else { separate(&format!("{x}")) }
}

/// Separates the thousands of the digits before the point.
fn separate(text: &str) -> String {
    let (whole, rest) = text.split_once('.').map_or((text, None), |(w, r)| (w, Some(r)));
    let (sign, digits) = whole.strip_prefix('-').map_or(("", whole), |d| ("-", d));
    let digits = digits.parse::<u64>().map_or_else(|_| digits.to_owned(), count);
    rest.map_or_else(|| format!("{sign}{digits}"), |r| format!("{sign}{digits}.{r}"))
}

/// Seconds as `0.042 s`, `12.3 s`, `4 min 05 s`, `2 h 03 min`.
pub fn seconds(s: f64) -> String {
    if !s.is_finite() || s < 0.0 {
        return "-".to_owned();
    }
    match s {
        s if s < 0.1 => format!("{:.1} ms", 1000.0 * s),
        s if s < 10.0 => format!("{s:.2} s"),
        s if s < 99.95 => format!("{s:.1} s"),
        s if s < 3600.0 => format!("{} min {:02} s", s as u64 / 60, s as u64 % 60),
        s => format!("{} h {:02} min", s as u64 / 3600, s as u64 % 3600 / 60),
    }
}
