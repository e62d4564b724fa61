// Finds the sections that hold every word of the query, best first: a word in a title counts more than one in the text,
// and a title that is the query most.
const form = document.querySelector("main form");
const field = form.elements.q;
const list = document.querySelector("#results");
const count = document.querySelector("#count");
const SHOWN = 50;
const AROUND = 90; // characters of a section that are shown on either side of the first hit

const entries = SEARCH_INDEX.map((entry) => ({
  ...entry,
  words: { page: entry.page.toLowerCase(), section: entry.section.toLowerCase(), text: entry.text.toLowerCase() },
}));

function score(entry, terms) {
  let total = 0;
  for (const term of terms) {
    const hits = entry.words.text.split(term).length - 1;
    const found = 20 * entry.words.section.includes(term) + 10 * entry.words.page.includes(term) + Math.min(hits, 5);
    if (!found) return 0;
    total += found;
  }
  return total + 100 * (entry.words.section === terms.join(" "));
}

function excerpt(entry, terms) {
  const places = terms.map((term) => entry.words.text.indexOf(term)).filter((place) => place >= 0);
  const middle = places.length ? Math.min(...places) : 0;
  const start = Math.max(0, middle - AROUND);
  const end = middle + AROUND;
  return (start > 0 ? "… " : "") + entry.text.slice(start, end) + (end < entry.text.length ? " …" : "");
}

// Marks the terms in a text; the text itself is never taken for HTML.
function marked(text, terms) {
  const part = document.createElement("p");
  const pattern = terms.map((term) => term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
  for (const piece of text.split(new RegExp(`(${pattern})`, "gi"))) {
    const known = terms.includes(piece.toLowerCase());
    const node = known ? document.createElement("mark") : document.createTextNode("");
    node.textContent = piece;
    part.append(node);
  }
  return part;
}

function show() {
  const terms = [...new Set(field.value.toLowerCase().split(/\s+/).filter(Boolean))];
  const found = !terms.length ? [] : entries
    .map((entry) => [score(entry, terms), entry])
    .filter(([value]) => value > 0)
    .sort(([one], [other]) => other - one);
  const sections = found.length === 1 ? "1 section" : `${found.length} sections`;
  count.textContent = terms.length ? sections + (found.length > SHOWN ? `, the first ${SHOWN} are shown` : "") : "";
  list.replaceChildren(...found.slice(0, SHOWN).map(([, entry]) => {
    const item = document.createElement("li");
    const link = document.createElement("a");
    link.href = entry.address;
    link.textContent = [entry.page, entry.section].filter((text, i, all) => text && all.indexOf(text) === i).join(" › ");
    item.append(link, marked(excerpt(entry, terms), terms));
    return item;
  }));
}

field.value = new URLSearchParams(location.search).get("q") ?? "";
field.addEventListener("input", show);
form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
show();
