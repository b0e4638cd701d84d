//! [`Card`]: what a value shows, once, from which both the HTML and the plain text are made.

use super::{html, text};

/// What a value shows: a title and blocks below it.
#[derive(Clone, Debug, Default)]
pub struct Card {
    /// First line.
    pub title: String,
    /// Second line, muted.
    pub subtitle: Option<String>,
    /// In order.
    pub blocks: Vec<Block>,
}

/// One block of a card.
#[derive(Clone, Debug)]
pub enum Block {
    /// Names and values.
    Facts(Vec<(String, String)>),
    /// A table.
    Table(Table),
    /// A chart with its caption and its plain-text twin (empty: none).
    Figure {
        /// From [`super::svg`].
        svg: String,
        /// What to see.
        caption: String,
        /// For the terminal.
        text: String,
    },
    /// A sentence.
    Note(String),
    /// Ready HTML, escaped by its maker, with its plain-text twin.
    Html {
        /// For the notebook.
        html: String,
        /// For the terminal.
        text: String,
    },
}

impl Card {
    /// A card with a title.
    pub fn new(title: impl Into<String>) -> Card {
        Card { title: title.into(), ..Card::default() }
    }

    /// Adds the second line.
    pub fn subtitle(mut self, subtitle: impl Into<String>) -> Card {
        self.subtitle = Some(subtitle.into());
        self
    }

    /// Adds names and values.
    pub fn facts<K: Into<String>>(mut self, facts: impl IntoIterator<Item = (K, String)>) -> Card {
        self.blocks.push(Block::Facts(facts.into_iter().map(|(k, v)| (k.into(), v)).collect()));
        self
    }

    /// Adds a table.
    pub fn table(mut self, table: Table) -> Card {
        self.blocks.push(Block::Table(table));
        self
    }

    /// Adds a chart; `text` is its plain twin.
    pub fn figure(mut self, svg: String, caption: impl Into<String>, text: impl Into<String>) -> Card {
        self.blocks.push(Block::Figure { svg, caption: caption.into(), text: text.into() });
        self
    }

    /// Adds a sentence.
    pub fn note(mut self, note: impl Into<String>) -> Card {
        self.blocks.push(Block::Note(note.into()));
        self
    }

    /// Adds HTML whose text was escaped by [`html::escape`].
    pub fn html(mut self, html: String, text: String) -> Card {
        self.blocks.push(Block::Html { html, text });
        self
    }

    /// The HTML, with its style and no script and no external resource.
    pub fn to_html(&self) -> String {
        html::card(self)
    }

    /// Aligned plain text.
    pub fn to_text(&self) -> String {
        text::card(self)
    }
}

/// Where a column's cells stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// One column.
#[derive(Clone, Debug)]
pub struct Column {
    /// Heading.
    pub name: String,
    /// Unit, shown after the heading; may be empty.
    pub unit: String,
    /// Words left, numbers right.
    pub align: Align,
}

impl Column {
    /// `name (unit)`.
    pub fn heading(&self) -> String {
        if self.unit.is_empty() { self.name.clone() } else { format!("{} ({})", self.name, self.unit) }
    }
}

/// What a cell means, beside its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Tone {
    /// Nothing in particular.
    #[default]
    Plain,
    /// Of less weight.
    Muted,
    /// Of more weight.
    Strong,
    /// It fits, it matches.
    Good,
    /// It does not.
    Bad,
}

/// One cell.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    /// What it says.
    pub text: String,
    /// What it means.
    pub tone: Tone,
    /// A coloured square before the text: the key to a chart.
    pub swatch: Option<usize>,
    /// A bar instead of text: share of the column's width (0 to 1) and colour.
    pub bar: Option<(f64, usize)>,
    /// Set in a fixed-width font.
    pub code: bool,
}

impl Cell {
    /// A cell with a text.
    pub fn new(text: impl Into<String>) -> Cell {
        Cell { text: text.into(), ..Cell::default() }
    }

    /// A bar of a share (0 to 1) in a colour of the palette.
    pub fn bar(share: f64, colour: usize) -> Cell {
        Cell { bar: Some((share, colour)), ..Cell::default() }
    }

    /// The same cell with a meaning.
    pub fn tone(mut self, tone: Tone) -> Cell {
        self.tone = tone;
        self
    }

    /// The same cell with a coloured square.
    pub fn swatch(mut self, colour: usize) -> Cell {
        self.swatch = Some(colour);
        self
    }

    /// The same cell in a fixed-width font.
    pub fn code(mut self) -> Cell {
        self.code = true;
        self
    }

    /// What the plain text shows: signs stand in for colours.
    pub(super) fn plain(&self, width: usize) -> String {
        match self.bar {
            Some((share, _)) => text::bar(share, width),
            None => self.text.clone(),
        }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell::new(text)
    }
}

/// One row.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// One per column.
    pub cells: Vec<Cell>,
    /// A sum: ruled off from the rows above.
    pub total: bool,
}

/// A table.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Said above it; may be empty.
    pub caption: String,
    /// Headings.
    pub columns: Vec<Column>,
    /// Rows, each with one cell per column.
    pub rows: Vec<Row>,
}

impl Table {
    /// A table without columns.
    pub fn new() -> Table {
        Table::default()
    }

    /// Sets what is said above it.
    pub fn caption(mut self, caption: impl Into<String>) -> Table {
        self.caption = caption.into();
        self
    }

    /// Adds a column of words.
    pub fn words(self, name: &str) -> Table {
        self.column(name, "", Align::Left)
    }

    /// Adds a column of numbers.
    pub fn numbers(self, name: &str, unit: &str) -> Table {
        self.column(name, unit, Align::Right)
    }

    fn column(mut self, name: &str, unit: &str, align: Align) -> Table {
        self.columns.push(Column { name: name.to_owned(), unit: unit.to_owned(), align });
        self
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(Row { cells: cells.into_iter().collect(), total: false });
    }

    /// Adds a row that is ruled off: a sum.
    pub fn total(&mut self, cells: impl IntoIterator<Item = Cell>) {
        let cells = cells.into_iter().map(|c| if c.tone == Tone::Plain { c.tone(Tone::Strong) } else { c }).collect();
        self.rows.push(Row { cells, total: true });
    }
}
