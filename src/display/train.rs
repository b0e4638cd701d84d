//! How training shows itself: one step, the curves of a run with its resumes, evaluations.

use super::svg::{Frame, Line, lines};
use super::units::{bytes, count, number, percent, plain, seconds};
use super::{Card, Cell, Show, Table, shown, text};
use crate::train::{EvalReport, Metrics, MicroReport, Run, StepReport, Steps, TrainConfig, lr_at};

impl Show for StepReport {
    fn card(&self) -> Card {
        let clipped = if self.clipped { ", clipped" } else { "" };
        let resumed = if self.resumed { ", the first after a resume" } else { "" };
        Card::new(format!("Step {}", count(self.step)))
            .subtitle(format!("epoch {:.2}{resumed}", self.epoch))
            .facts([
                ("loss", format!("{:.4} (perplexity {})", self.loss, number(self.loss.exp(), 4))),
                ("gradient norm", format!("{}{clipped}", number(self.grad_norm, 4))),
                ("learning rate", number(self.learning_rate, 4)),
                ("tokens", format!("{}, {} with a loss", count(self.tokens), count(self.trained_tokens))),
                ("speed", format!("{} tokens/s", number(self.tokens_per_second, 4))),
                ("arena", bytes(self.arena_bytes)),
            ])
            .table(times(self))
    }
}

fn times(r: &StepReport) -> Table {
    let mut t = Table::new().words("time for").numbers("", "").numbers("share", "").words("");
    let stages = r.stages();
    let known: f64 = stages.iter().map(|(_, s)| s).sum();
    let rest = ("rest".to_owned(), (r.seconds - known).max(0.0));
    for (i, (name, s)) in stages.into_iter().chain([rest]).enumerate() {
        let share = s / r.seconds.max(1e-12);
        t.row([name.into(), seconds(s).into(), percent(share).into(), Cell::bar(share, [7, 0, 3, 5, 11][i.min(4)])]);
    }
    t.total(["step".into(), seconds(r.seconds).into(), "".into(), "".into()]);
    t
}

impl Show for MicroReport {
    fn card(&self) -> Card {
        let examples: Vec<String> = self.examples.iter().map(usize::to_string).collect();
        Card::new(format!("Micro-step {} of {} of step {}", self.index, self.of, self.step)).facts([
            ("loss", format!("{:.4}", self.loss)),
            ("tokens", format!("{}, {} with a loss", count(self.tokens), count(self.trained_tokens))),
            ("examples", super::data::short(&examples.join(", "), 72)),
            ("time", seconds(self.seconds)),
        ])
    }
}

impl Show for EvalReport {
    fn card(&self) -> Card {
        Card::new(format!("Evaluation after step {}", count(self.step))).facts([
            ("loss", format!("{:.4}", self.loss)),
            ("perplexity", number(self.perplexity(), 4)),
            ("examples", count(self.examples)),
            ("tokens", format!("{}, {} with a loss", count(self.tokens), count(self.trained_tokens))),
            ("time", seconds(self.seconds)),
        ])
    }
}

impl Show for Metrics {
    fn card(&self) -> Card {
        let subtitle = match self.steps.last() {
            Some(last) => format!("{} steps, {:.2} epochs", count(self.steps.len() as u64), last.epoch),
            None => "no step yet".to_owned(),
        };
        curves(Card::new("Run").subtitle(subtitle), &self.steps, &self.evaluations)
    }
}

impl Show for Steps {
    fn card(&self) -> Card {
        let title = format!(
            "{} steps done, {} of {} in the run",
            count(self.reports.len() as u64),
            count(self.step),
            count(self.total_steps)
        );
        let card = Card::new(title);
        let card = if self.interrupted {
            card.subtitle("interrupted: everything is kept, the next call goes on")
        } else {
            card
        };
        curves(card, &self.reports, &[])
    }
}

impl Show for Run {
    fn card(&self) -> Card {
        let c = self.config();
        let state = if self.is_finished() { "finished" } else { "can go on" };
        let card = Card::new(format!("Run {}", self.dir().display()))
            .subtitle(format!("step {} of {}, {state}", count(self.step_count()), count(self.total_steps())))
            .facts([
                ("method", format!("{} of {}", self.plan().config().method.label(), self.plan().spec().name)),
                ("data", format!("{} examples", count(self.dataset().len() as u64))),
                (
                    "effective batch",
                    format!("{} x {} examples", c.per_device_train_batch_size, c.gradient_accumulation_steps),
                ),
                ("learning rate", format!("{} {}, {}", plain(c.learning_rate), c.lr_scheduler_type, c.optim)),
                ("arena", bytes(self.plan().arena_bytes())),
            ]);
        match self.history() {
            Ok(m) if !m.steps.is_empty() => curves(card, &m.steps, &m.evaluations),
            _ => card,
        }
    }
}

/// Loss, learning rate and gradient norm over the steps, with a mark where the run was resumed.
pub(super) fn curves(card: Card, steps: &[StepReport], evaluations: &[EvalReport]) -> Card {
    let (Some(first), Some(last)) = (steps.first(), steps.last()) else { return card };
    let mut card = card.figure(loss_chart(steps, evaluations), loss_caption(steps, evaluations), sparklines(steps));
    if steps.len() > 1 {
        let lr = small(steps, "learning rate", 1, |r| r.learning_rate);
        let norm = small(steps, "gradient norm", 5, |r| r.grad_norm);
        card = card.figure(format!("<div class=\"tb-row\">{lr}{norm}</div>"), "", "");
    }
    let tokens: u64 = steps.iter().map(|r| r.tokens).sum();
    let time: f64 = steps.iter().map(|r| r.seconds).sum();
    let mut facts = vec![
        ("loss", format!("{:.4} at step {}, {:.4} at step {}", first.loss, first.step, last.loss, last.step)),
        (
            "tokens",
            format!("{} in {}, {} tokens/s", count(tokens), seconds(time), number(tokens as f64 / time.max(1e-12), 4)),
        ),
    ];
    if let Some(e) = evaluations.last() {
        facts.push((
            "evaluation",
            format!("loss {:.4} after step {}, perplexity {}", e.loss, e.step, number(e.perplexity(), 4)),
        ));
    }
    let resumes = resumes(steps);
    if !resumes.is_empty() {
        facts.push(("resumed after step", resumes.iter().map(|s| count(*s)).collect::<Vec<_>>().join(", ")));
    }
    card.facts(facts)
}

fn resumes(steps: &[StepReport]) -> Vec<u64> {
    steps.iter().filter(|r| r.resumed).map(|r| r.step.saturating_sub(1)).collect()
}

fn marks(steps: &[StepReport], name: &str) -> Vec<(f64, String)> {
    resumes(steps).into_iter().map(|s| (s as f64 + 0.5, name.to_owned())).collect()
}

fn loss_chart(steps: &[StepReport], evaluations: &[EvalReport]) -> String {
    let raw: Vec<(f64, f64)> = steps.iter().map(|r| (r.step as f64, r.loss)).collect();
    let smooth = smoothed(&raw);
    let eval: Vec<(f64, f64)> = evaluations.iter().map(|e| (e.step as f64, e.loss)).collect();
    let opacity = if smooth.is_empty() { 1.0 } else { 0.35 };
    let all = [
        Line { opacity, ..Line::new(raw.clone(), 0) },
        Line { width: 20, ..Line::new(smooth, 0) },
        Line { dots: true, ..Line::new(eval.clone(), 3) },
    ];
    let points = || raw.iter().chain(&eval);
    let frame = Frame::around(points().map(|p| p.0), points().map(|p| p.1))
        .labels("step", "loss")
        .counted()
        .size(720, 240)
        .alt("loss by step");
    lines(&frame, &all, &marks(steps, "resumed"))
}

/// A centred mean over a twentieth of the steps; empty for few steps, which need none.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() < 40 {
        return Vec::new();
    }
    let half = (points.len() / 40).max(1);
    let mean = |i: usize| {
        let window = &points[i.saturating_sub(half)..(i + half + 1).min(points.len())];
        window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64
    };
    points.iter().enumerate().map(|(i, p)| (p.0, mean(i))).collect()
}

fn loss_caption(steps: &[StepReport], evaluations: &[EvalReport]) -> String {
    let mut out = "Loss: mean cross-entropy over the trained tokens of each step".to_owned();
    if steps.len() >= 40 {
        out.push_str(" (faint), and its running mean");
    }
    if !evaluations.is_empty() {
        out.push_str("; evaluation with dots");
    }
    out
}

fn small(steps: &[StepReport], name: &str, colour: usize, value: fn(&StepReport) -> f64) -> String {
    let points = steps.iter().map(|r| (r.step as f64, value(r))).collect();
    from_zero(points, name, colour, (354, 150), &marks(steps, ""))
}

/// One line over the steps; tiny values are multiplied by a power of ten that the axis names.
fn from_zero(
    mut points: Vec<(f64, f64)>,
    name: &str,
    colour: usize,
    size: (u32, u32),
    marks: &[(f64, String)],
) -> String {
    let most = points.iter().map(|p| p.1).filter(|y| y.is_finite()).fold(0.0, f64::max);
    let exponent = if most > 0.0 && most < 0.01 { most.log10().floor() as i32 } else { 0 };
    points.iter_mut().for_each(|p| p.1 /= 10_f64.powi(exponent));
    let unit = if exponent == 0 { String::new() } else { format!(" (1e{exponent})") };
    let frame = Frame::around(points.iter().map(|p| p.0), points.iter().map(|p| p.1))
        .from_zero()
        .labels("step", &format!("{name}{unit}"))
        .counted()
        .size(size.0, size.1)
        .alt(format!("{name} by step"));
    lines(&frame, &[Line::new(points, colour)], marks)
}

fn sparklines(steps: &[StepReport]) -> String {
    let row = |name: &str, value: fn(&StepReport) -> f64| {
        let values: Vec<f64> = steps.iter().map(value).collect();
        let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
        format!("{name:<14} {}  {} to {}", text::sparkline(&values, 48), number(low, 4), number(high, 4))
    };
    [row("loss", |r| r.loss), row("learning rate", |r| r.learning_rate), row("gradient norm", |r| r.grad_norm)]
        .join("\n")
}

impl Show for TrainConfig {
    fn card(&self) -> Card {
        let length = self
            .max_steps
            .map_or_else(|| format!("{} epochs", plain(self.num_train_epochs)), |n| format!("{} steps", count(n)));
        // 1,000 steps show the shape when the number of examples is not known yet.
        let total = self.max_steps.unwrap_or(1000);
        let at = |i: u64| (i as f64 / 240.0 * total.saturating_sub(1) as f64).round() as u64;
        let points: Vec<(f64, f64)> = (0..=240).map(|i| (at(i) as f64 + 1.0, lr_at(self, at(i), total))).collect();
        let curve: Vec<f64> = points.iter().map(|p| p.1).collect();
        let mut t = Table::new().words("field").words("value");
        if let Ok(value) = serde_json::to_value(self) {
            for (name, value) in value.as_object().into_iter().flatten() {
                let text = value
                    .as_str()
                    .map_or_else(|| value.as_f64().map_or_else(|| value.to_string(), plain), str::to_owned);
                t.row([Cell::new(name).code(), text.into()]);
            }
        }
        let chart = from_zero(points, "learning rate", 1, (540, 160), &[]);
        Card::new("Training configuration")
            .subtitle(format!("{length}, effective batch of {} examples", count(self.effective_batch() as u64)))
            .figure(chart, format!("{} schedule", self.lr_scheduler_type), text::sparkline(&curve, 48))
            .table(t)
    }
}

shown!(StepReport, MicroReport, EvalReport, TrainConfig);
shown!(+ Display Run);
shown!(Metrics { steps, evaluations });
shown!(Steps { reports, interrupted, step, total_steps });
