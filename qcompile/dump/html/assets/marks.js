// How a node is written: its call with the operator set off, links to what it reads, and words that are not the same on two sides.

const CALL = /^%(\S+) = ([^\s(]+)\((.*)\)$/s;

const nodeHref = (name, number) => `#node/${encodeURIComponent(name)}@${number}`;
const kernelHref = (name) => `#kernel/${encodeURIComponent(name)}`;
const passHref = (number) => `#pass/${number}`;
const passNumber = (record) => String(record.index + 1).padStart(3, "0");

/** The call of a node as spans: name, operator, arguments. */
function callSpans(node) {
  const parts = node.call.match(CALL);
  if (!parts) return [h("span", { class: "arguments" }, node.call)];
  const [, name, operator, rest] = parts;
  if (node.op === "constant") return [h("span", { class: "result" }, rest)];
  return [
    h("span", { class: "result" }, name),
    " = ",
    h("span", { class: "operator" }, operator),
    h("span", { class: "arguments" }, `(${rest})`),
  ];
}

/** The call with every node that it reads as a link into the same listing. */
function linkedCall(node, listing) {
  return node.call.split(/(%[\w.]+)/).map((word) => {
    const name = word.startsWith("%") ? word.slice(1) : "";
    return name !== node.name && listing.byName.has(name) ? h("a", { href: nodeHref(name, listing.number) }, word) : word;
  });
}

const words = (text) => text.match(/[A-Za-z]+|\d+|\s+|[^\sA-Za-z\d]/g) ?? [];
const MOST = 200000;

/** Both texts as spans, words of the one that are not in the other set off (longest common subsequence). */
function wordSpans(before, after) {
  const [a, b] = [words(before), words(after)];
  if (before === after || a.length * b.length > MOST) return [[before], [after]];
  const [keepA, keepB] = commonWords(a, b);
  return [spans(a, keepA), spans(b, keepB)];
}

function commonWords(a, b) {
  const best = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1)
      best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
  }
  const [keepA, keepB] = [new Set(), new Set()];
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) {
      keepA.add(i);
      keepB.add(j);
      i += 1;
      j += 1;
    } else if (best[i + 1][j] >= best[i][j + 1]) i += 1;
    else j += 1;
  }
  return [keepA, keepB];
}

function spans(list, kept) {
  const runs = [];
  list.forEach((word, index) => {
    const same = kept.has(index),
      run = runs.at(-1);
    if (run && run.same === same) run.text += word;
    else runs.push({ same, text: word });
  });
  return runs.map(({ same, text }) => (same ? text : h("mark", {}, text)));
}

const COMMENT = /(#[^\n]*)/;
const STRING = /("""[\s\S]*?"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')/;
const KEYWORD =
  /\b(def|return|for|in|if|else|elif|import|from|as|while|and|or|not|None|True|False|with|class|lambda)\b/;
const PYTHON = new RegExp([COMMENT, STRING, KEYWORD].map((part) => part.source).join("|"), "g");

/** Source code with comments, strings and keywords set off. */
function sourceSpans(source) {
  const made = [];
  let done = 0;
  for (const found of source.matchAll(PYTHON)) {
    const kind = found[1] ? "comment" : found[2] ? "string" : "keyword";
    made.push(source.slice(done, found.index), h("span", { class: kind }, found[0]));
    done = found.index + found[0].length;
  }
  return [...made, source.slice(done)];
}
