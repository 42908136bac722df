//! The machine that pickles are programs of, as far as maps of tensors need it.
//!
//! It builds numbered nodes that refer to each other by number: memory is in proportion to the program however often a node
//! is referred to or how deep nodes nest, and nothing recurses.

use std::collections::HashMap;

use super::Read;

// Instructions, by the names of Python's pickletools.
const PROTO: u8 = 0x80;
const FRAME: u8 = 0x95;
const STOP: u8 = b'.';
const MARK: u8 = b'(';
const NONE: u8 = b'N';
const NEW_TRUE: u8 = 0x88;
const NEW_FALSE: u8 = 0x89;
const BIN_FLOAT: u8 = b'G';
const BIN_INT_1: u8 = b'K';
const BIN_INT_2: u8 = b'M';
const BIN_INT: u8 = b'J';
const LONG_1: u8 = 0x8a;
const BIN_UNICODE: u8 = b'X';
const SHORT_BIN_UNICODE: u8 = 0x8c;
const GLOBAL: u8 = b'c';
const STACK_GLOBAL: u8 = 0x93;
const EMPTY_TUPLE: u8 = b')';
const EMPTY_LIST: u8 = b']';
const EMPTY_DICT: u8 = b'}';
const TUPLE: u8 = b't';
const LIST: u8 = b'l';
const DICT: u8 = b'd';
const TUPLE_1: u8 = 0x85;
const TUPLE_3: u8 = 0x87;
const APPEND: u8 = b'a';
const APPENDS: u8 = b'e';
const SET_ITEM: u8 = b's';
const SET_ITEMS: u8 = b'u';
const REDUCE: u8 = b'R';
const NEW_OBJ: u8 = 0x81;
const BUILD: u8 = b'b';
const BIN_PERS_ID: u8 = b'Q';
const BIN_PUT: u8 = b'q';
const LONG_BIN_PUT: u8 = b'r';
const MEMOIZE: u8 = 0x94;
const BIN_GET: u8 = b'h';
const LONG_BIN_GET: u8 = b'j';

/// Most nodes: a tensor takes some twenty.
const MAX_NODES: usize = 4 << 20;
const EMPTY: &str = "an instruction finds nothing to work on";

/// A node's number.
pub(super) type Id = usize;

/// What instructions build. Texts are the program's own.
#[derive(Debug)]
pub(super) enum Node<'a> {
    /// What no tensor is made of: nothing, a fraction.
    Other,
    Int(i64),
    Text(&'a str),
    Class(&'a str, &'a str),
    /// A tuple or a list.
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A callable and its arguments.
    Call(Id, Id),
    /// What is stored beside the pickle.
    Stored(Id),
}

/// What is on the stack.
#[derive(Debug, Clone, Copy)]
enum Slot {
    Mark,
    Node(Id),
}

/// The reader's state.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    program: &'a [u8],
    at: usize,
    nodes: Vec<Node<'a>>,
    stack: Vec<Slot>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    pub(super) fn new(program: &'a [u8]) -> Self {
        Self { program, at: 0, nodes: Vec::new(), stack: Vec::new(), memo: HashMap::new() }
    }

    /// Runs to the end; the node that is left.
    pub(super) fn run(&mut self) -> Read<Id> {
        loop {
            let op = self.byte()?;
            if op == STOP {
                return self.pop();
            }
            self.step(op)?;
        }
    }

    fn step(&mut self, op: u8) -> Read<()> {
        let node = match op {
            PROTO => return self.skip(1),
            FRAME => return self.skip(8),
            MARK => {
                self.stack.push(Slot::Mark);
                return Ok(());
            }
            NONE | NEW_TRUE | NEW_FALSE => Node::Other,
            BIN_FLOAT => {
                self.skip(8)?;
                Node::Other
            }
            BIN_INT_1 => Node::Int(self.byte()?.into()),
            BIN_INT_2 => Node::Int(u16::from_le_bytes(self.array()?).into()),
            BIN_INT => Node::Int(self.u32()?.cast_signed().into()),
            LONG_1 => Node::Int(self.long()?),
            BIN_UNICODE => {
                let length = self.u32()?;
                Node::Text(self.text(length as usize)?)
            }
            SHORT_BIN_UNICODE => {
                let length = self.byte()?;
                Node::Text(self.text(length.into())?)
            }
            GLOBAL => Node::Class(self.line()?, self.line()?),
            STACK_GLOBAL => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.node(module), self.node(name)) {
                    (Node::Text(module), Node::Text(name)) => Node::Class(module, name),
                    _ => return Err(self.bad("a class is named by something else than texts")),
                }
            }
            EMPTY_TUPLE | EMPTY_LIST => Node::List(vec![]),
            EMPTY_DICT => Node::Dict(vec![]),
            TUPLE | LIST => Node::List(self.take_marked()?),
            DICT => Node::Dict(self.take_pairs()?),
            TUPLE_1..=TUPLE_3 => {
                let from = self.stack.len().checked_sub(usize::from(op - TUPLE_1) + 1);
                Node::List(self.split(from.ok_or_else(|| self.bad(EMPTY))?)?)
            }
            APPEND => {
                let item = self.pop()?;
                return self.extend(vec![item]);
            }
            APPENDS => {
                let items = self.take_marked()?;
                return self.extend(items);
            }
            SET_ITEM => {
                let (value, key) = (self.pop()?, self.pop()?);
                return self.insert(vec![(key, value)]);
            }
            SET_ITEMS => {
                let pairs = self.take_pairs()?;
                return self.insert(pairs);
            }
            REDUCE | NEW_OBJ => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                match self.node(callable) {
                    Node::Class("collections", "OrderedDict" | "defaultdict") => Node::Dict(vec![]),
                    _ => Node::Call(callable, arguments),
                }
            }
            // an object's attributes; those of a map are no items of it
            BUILD => return self.pop().map(|_| ()),
            BIN_PERS_ID => Node::Stored(self.pop()?),
            BIN_PUT => {
                let number = self.byte()?;
                return self.keep(number.into());
            }
            LONG_BIN_PUT => {
                let number = self.u32()?;
                return self.keep(number);
            }
            MEMOIZE => return self.keep(self.memo.len() as u32),
            BIN_GET => {
                let number = self.byte()?;
                return self.kept(number.into());
            }
            LONG_BIN_GET => {
                let number = self.u32()?;
                return self.kept(number);
            }
            other => return Err(self.bad(&format!("the instruction {other:#04x} is none of a map of tensors"))),
        };
        if self.nodes.len() >= MAX_NODES {
            return Err(self.bad(&format!("it builds more than {MAX_NODES} values")));
        }
        self.stack.push(Slot::Node(self.nodes.len()));
        self.nodes.push(node);
        Ok(())
    }

    fn bad(&self, what: &str) -> String {
        format!("at byte {} of its pickle: {what}", self.at)
    }

    fn take(&mut self, n: usize) -> Read<&'a [u8]> {
        let taken = self.at.checked_add(n).and_then(|end| self.program.get(self.at..end));
        let taken = taken.ok_or_else(|| self.bad("it ends within an instruction"))?;
        self.at += n;
        Ok(taken)
    }

    fn skip(&mut self, n: usize) -> Read<()> {
        self.take(n).map(|_| ())
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn byte(&mut self) -> Read<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Read<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn text(&mut self, length: usize) -> Read<&'a str> {
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|_| self.bad("a text is not UTF-8"))
    }

    fn line(&mut self) -> Read<&'a str> {
        let rest = self.program.get(self.at..).unwrap_or_default();
        let length = rest.iter().position(|b| *b == b'\n').ok_or_else(|| self.bad("a name has no end"))?;
        let bytes = self.take(length + 1)?;
        std::str::from_utf8(&bytes[..length]).map_err(|_| self.bad("a name is not UTF-8"))
    }

    /// A whole number of up to eight bytes.
    fn long(&mut self) -> Read<i64> {
        let length = self.byte()?;
        if length > 8 {
            return Err(self.bad("a number has more than 64 bits"));
        }
        let bytes = self.take(length.into())?;
        let negative = bytes.last().is_some_and(|top| top & 0x80 != 0);
        let mut out = [if negative { 0xFF } else { 0 }; 8];
        out[..bytes.len()].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(out))
    }

    pub(super) fn node(&self, id: Id) -> &Node<'a> {
        self.nodes.get(id).unwrap_or(&Node::Other)
    }

    fn pop(&mut self) -> Read<Id> {
        match self.stack.pop() {
            Some(Slot::Node(id)) => Ok(id),
            Some(Slot::Mark) | None => Err(self.bad(EMPTY)),
        }
    }

    fn last(&self) -> Read<Id> {
        match self.stack.last() {
            Some(Slot::Node(id)) => Ok(*id),
            Some(Slot::Mark) | None => Err(self.bad(EMPTY)),
        }
    }

    /// Takes the nodes from a place of the stack on.
    fn split(&mut self, from: usize) -> Read<Vec<Id>> {
        let taken = self.stack.split_off(from);
        let node = |slot: &Slot| match slot {
            Slot::Node(id) => Ok(*id),
            Slot::Mark => Err(self.bad(EMPTY)),
        };
        taken.iter().map(node).collect()
    }

    /// Takes the nodes above the last mark, and the mark.
    fn take_marked(&mut self) -> Read<Vec<Id>> {
        let mark = self.stack.iter().rposition(|slot| matches!(slot, Slot::Mark));
        let items = self.split(mark.ok_or_else(|| self.bad("a mark is missing"))? + 1)?;
        self.stack.pop();
        Ok(items)
    }

    /// The same as keys and values.
    fn take_pairs(&mut self) -> Read<Vec<(Id, Id)>> {
        match self.take_marked()?.as_chunks::<2>() {
            (pairs, []) => Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect()),
            _ => Err(self.bad("a key has no value")),
        }
    }

    fn extend(&mut self, items: Vec<Id>) -> Read<()> {
        let id = self.last()?;
        match self.nodes.get_mut(id) {
            Some(Node::List(list)) => list.extend(items),
            _ => return Err(self.bad("an item is added to what is no list")),
        }
        Ok(())
    }

    fn insert(&mut self, pairs: Vec<(Id, Id)>) -> Read<()> {
        let id = self.last()?;
        match self.nodes.get_mut(id) {
            Some(Node::Dict(all)) => all.extend(pairs),
            _ => return Err(self.bad("an item is added to what is no map")),
        }
        Ok(())
    }

    fn keep(&mut self, number: u32) -> Read<()> {
        let id = self.last()?;
        self.memo.insert(number, id);
        Ok(())
    }

    fn kept(&mut self, number: u32) -> Read<()> {
        let id = self.memo.get(&number).copied().ok_or_else(|| self.bad("it refers to what was not kept"))?;
        self.stack.push(Slot::Node(id));
        Ok(())
    }
}
