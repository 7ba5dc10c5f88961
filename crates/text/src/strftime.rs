//! Python's `strftime`, for a moment the caller names (UTC).

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Formats seconds since 1970-01-01T00:00:00Z as Python formats a time without a zone. Unknown directives are an error
/// that names them.
pub(crate) fn strftime(format: &str, unix_seconds: i64) -> Result<String, String> {
    let mut out = String::new();
    let moment = Moment::of(unix_seconds);
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        // Flags of the C library: `-` no filling, `_` spaces, `0` zeros, `^` capitals.
        let mut fill = None;
        let mut capitals = false;
        let directive = loop {
            match chars.next() {
                Some(flag @ ('-' | '_' | '0')) => fill = Some(flag),
                Some('^') => capitals = true,
                Some(directive) => break directive,
                None => return Err("strftime_now: the format ends with `%`".to_owned()),
            }
        };
        let text = moment
            .directive(directive, fill)
            .ok_or_else(|| format!("strftime_now: unknown directive `%{directive}`"))?;
        if capitals { out.push_str(&text.to_uppercase()) } else { out.push_str(&text) }
    }
    Ok(out)
}

struct Moment {
    unix_seconds: i64,
    year: i64,
    month: i64,
    day: i64,
    /// From 0, the first of January.
    year_day: i64,
    /// From 0, Sunday.
    weekday: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

impl Moment {
    fn of(unix_seconds: i64) -> Moment {
        let days = unix_seconds.div_euclid(86_400);
        let second = unix_seconds.rem_euclid(86_400);
        let (year, month, day) = civil(days);
        Moment {
            unix_seconds,
            year,
            month,
            day,
            year_day: days - day_number(year, 1, 1),
            weekday: (days + 4).rem_euclid(7),
            hour: second / 3600,
            minute: second / 60 % 60,
            second: second % 60,
        }
    }

    /// Year and week by ISO 8601: weeks begin on Monday, the first one holds the first Thursday.
    fn iso_week(&self) -> (i64, i64) {
        let monday = (self.weekday + 6) % 7;
        let thursday = day_number(self.year, self.month, self.day) - monday + 3;
        let (year, _, _) = civil(thursday);
        (year, (thursday - day_number(year, 1, 1)) / 7 + 1)
    }

    fn directive(&self, directive: char, fill: Option<char>) -> Option<String> {
        let number = |value: i64, width: usize, usual: char| match fill.unwrap_or(usual) {
            '-' => value.to_string(),
            '_' => format!("{value:width$}"),
            _ => format!("{value:0width$}"),
        };
        let two = |value: i64| number(value, 2, '0');
        let month = MONTHS[self.month as usize - 1];
        let day = DAYS[self.weekday as usize];
        let hour12 = if self.hour % 12 == 0 { 12 } else { self.hour % 12 };
        let half = if self.hour < 12 { "AM" } else { "PM" };
        let (y, m, d) = (self.year, self.month, self.day);
        let clock = format!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second);
        Some(match directive {
            'Y' => number(y, 4, '-'),
            'y' => two(y.rem_euclid(100)),
            'C' => two(y.div_euclid(100)),
            'm' => two(m),
            'd' => two(d),
            'e' => number(d, 2, '_'),
            'j' => number(self.year_day + 1, 3, '0'),
            'B' => month.to_owned(),
            'b' | 'h' => month[..3].to_owned(),
            'A' => day.to_owned(),
            'a' => day[..3].to_owned(),
            'w' => self.weekday.to_string(),
            'u' => (if self.weekday == 0 { 7 } else { self.weekday }).to_string(),
            'U' => two((self.year_day + 7 - self.weekday) / 7),
            'W' => two((self.year_day + 7 - (self.weekday + 6) % 7) / 7),
            'V' => two(self.iso_week().1),
            'G' => self.iso_week().0.to_string(),
            'g' => two(self.iso_week().0.rem_euclid(100)),
            'H' => two(self.hour),
            'k' => number(self.hour, 2, '_'),
            'I' => two(hour12),
            'l' => number(hour12, 2, '_'),
            'p' => half.to_owned(),
            'P' => half.to_lowercase(),
            'M' => two(self.minute),
            'S' => two(self.second),
            'f' => "000000".to_owned(),
            's' => self.unix_seconds.to_string(),
            'F' => format!("{y}-{m:02}-{d:02}"),
            'D' | 'x' => format!("{m:02}/{d:02}/{:02}", y.rem_euclid(100)),
            'T' | 'X' => clock,
            'R' => format!("{:02}:{:02}", self.hour, self.minute),
            'r' => format!("{hour12:02}:{:02}:{:02} {half}", self.minute, self.second),
            'c' => format!("{} {} {d:2} {clock} {y}", &day[..3], &month[..3]),
            // `datetime.now()` knows no zone.
            'Z' | 'z' => String::new(),
            'n' => "\n".to_owned(),
            't' => "\t".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

/// Days from 1970-01-01 to a date.
pub(crate) fn day_number(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let mp = (month + 9) % 12;
    let doy = (153 * mp + 2) / 5 + day - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

/// Year, month and day of a day number counted from 1970-01-01 [Hinnant, `civil_from_days`].
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(format: &str, unix_seconds: i64, expected: &str) {
        assert_eq!(strftime(format, unix_seconds).as_deref(), Ok(expected));
    }

    #[test]
    fn dates_are_written_as_python_writes_them() {
        check("%d %b %Y", 1_721_952_000, "26 Jul 2024");
        check("%A, %-d %B %y %H:%M:%S %p", 951_827_696, "Tuesday, 29 February 00 12:34:56 PM");
        check("%F %T %a", 0, "1970-01-01 00:00:00 Thu");
        check("%F", -86_400, "1969-12-31");
        // From Python's datetime(2027, 1, 3, 4, 5, 6).strftime.
        let moment = 1_798_949_106;
        check("%j %U %W %V %G %g %u %w", moment, "003 01 00 53 2026 26 7 0");
        check(
            "%c|%x|%X|%D|%R|%r",
            moment,
            "Sun Jan  3 04:05:06 2027|01/03/27|04:05:06|01/03/27|04:05|04:05:06 AM",
        );
        check(
            "%e|%-d|%-m|%_d|%k|%l|%P|%C|%f|%^a|%Z%z|%n%t%%",
            moment,
            " 3|3|1| 3| 4| 4|am|20|000000|SUN||\n\t%",
        );
    }

    #[test]
    fn unknown_directives_are_named() {
        assert_eq!(strftime("%Q", 0), Err("strftime_now: unknown directive `%Q`".into()));
        assert!(strftime("%", 0).is_err());
    }
}
