//! `2026-01-02T03:04:05.006Z`, written and read by hand: every event that leaves its process bears one, and a library that knows all of
//! RFC 3339 takes longer for it than for the rest of the event. Whatever looks different is left to that library. Days and dates are
//! converted as Howard Hinnant's `days_from_civil` and `civil_from_days` do (<https://howardhinnant.github.io/date_algorithms.html>).

/// How long the usual form is.
pub(crate) const LENGTH: usize = 24;

const DAY: i64 = 86_400_000;

/// The form with everything but the digits.
const FORM: [u8; LENGTH] = *b"0000-00-00T00:00:00.000Z";

/// Where its numbers are: from, to.
const YEAR: (usize, usize) = (0, 4);
const MONTH: (usize, usize) = (5, 7);
const DAY_OF_MONTH: (usize, usize) = (8, 10);
const HOUR: (usize, usize) = (11, 13);
const MINUTE: (usize, usize) = (14, 16);
const SECOND: (usize, usize) = (17, 19);
const MILLI: (usize, usize) = (20, 23);

/// The usual form of these milliseconds since 1970; none outside the years 0 to 9999.
pub(crate) fn format(millis: i64) -> Option<[u8; LENGTH]> {
    let (days, rest) = (millis.div_euclid(DAY), millis.rem_euclid(DAY));
    let (year, month, day) = date(days)?;
    let mut text = FORM;
    let mut put = |(from, to): (usize, usize), mut number: i64| {
        for place in (from..to).rev() {
            text[place] = b'0' + u8::try_from(number % 10).expect("a digit");
            number /= 10;
        }
    };
    put(YEAR, year);
    put(MONTH, month);
    put(DAY_OF_MONTH, day);
    put(HOUR, rest / 3_600_000);
    put(MINUTE, rest / 60_000 % 60);
    put(SECOND, rest / 1000 % 60);
    put(MILLI, rest % 1000);
    Some(text)
}

/// Reads the usual form; none if it looks different, or is no time.
pub(crate) fn parse(text: &[u8]) -> Option<i64> {
    let text: &[u8; LENGTH] = text.try_into().ok()?;
    let fits = text.iter().zip(&FORM).all(|(found, form)| if *form == b'0' { found.is_ascii_digit() } else { found == form });
    let get = |(from, to): (usize, usize)| text[from..to].iter().fold(0, |sum, digit| 10 * sum + i64::from(digit - b'0'));
    if !fits {
        return None;
    }
    let (hour, minute, second) = (get(HOUR), get(MINUTE), get(SECOND));
    let days = days(get(YEAR), get(MONTH), get(DAY_OF_MONTH))?;
    // A leap second, and what is wrong, is for the library to judge.
    let within = hour < 24 && minute < 60 && second < 60;
    within.then(|| days * DAY + ((hour * 60 + minute) * 60 + second) * 1000 + get(MILLI))
}

/// Days since 1970 of a date of the proleptic Gregorian calendar. Years begin in March here, so that the odd day is their last.
fn days(year: i64, month: i64, day: i64) -> Option<i64> {
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let shifted = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (shifted.div_euclid(400), shifted.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    // The thirtieth of February is another day when it comes back.
    (date(days)? == (year, month, day)).then_some(days)
}

/// The date of a day counted from 1970; none outside the years 0 to 9999.
fn date(days: i64) -> Option<(i64, i64, i64)> {
    let shifted = days.checked_add(719_468)?;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (0..=9999).contains(&year).then_some((year, month, day))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn says_what_the_library_says(millis in -62_200_000_000_000_i64..253_402_300_800_000) {
            let time = jiff::Timestamp::from_millisecond(millis).unwrap();
            let theirs = format!("{time:.3}");
            match format(millis) {
                Some(ours) => {
                    prop_assert_eq!(std::str::from_utf8(&ours).unwrap(), &theirs);
                    prop_assert_eq!(parse(&ours), Some(millis));
                }
                None => prop_assert!(theirs.starts_with('-'), "{theirs}"),
            }
        }

        #[test]
        fn reads_what_the_library_reads(text in "(19|20|00|99)[0-9]{2}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-6][0-9]:[0-6][0-9].[0-9]{3}Z") {
            if let Some(ours) = parse(text.as_bytes()) {
                prop_assert_eq!(Some(ours), text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_millisecond));
            }
        }
    }

    #[test]
    fn what_looks_different_is_left_alone() {
        for text in
            ["", "2026-01-02T03:04:05Z", "2026-01-02t03:04:05.006Z", "2026-02-30T03:04:05.006Z", "2026-01-02T24:04:05.006Z"]
        {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
        assert_eq!(parse(b"1970-01-01T00:00:00.001Z"), Some(1));
        assert_eq!(format(i64::MIN), None);
        assert_eq!(format(i64::MAX), None);
    }
}
