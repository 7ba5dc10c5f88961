// The Markdown that our own cards and result pages use, as elements: headings, paragraphs, lists, tables, code, links.
// Anything else stays the text that it is.

import { h, table } from "/assets/dom.js";

/** Elements for a page; front matter is left out, headings begin one level down. */
export function markdown(text) {
  const lines = text.replace(/^---\n[\s\S]*?\n---\n/, "").split("\n");
  const out = h("div", { class: "prose" });
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const heading = line.match(/^(#{1,4}) (.*)/);
    if (!line.trim()) i++;
    else if (line.startsWith("```")) {
      const end = lines.indexOf("```", i + 1);
      const last = end < 0 ? lines.length : end;
      out.append(h("pre", { tabIndex: 0 }, h("code", {}, lines.slice(i + 1, last).join("\n"))));
      i = last + 1;
    } else if (heading) {
      out.append(h(`h${heading[1].length + 1}`, {}, inline(heading[2])));
      i++;
    } else if (line.startsWith("|")) {
      const block = take(lines, i, (l) => l.startsWith("|"));
      const cells = (l) => l.trim().replace(/^\||\|$/g, "").split("|").map((c) => c.trim());
      const align = cells(block[1] ?? "").map((c) => (c.endsWith(":") && !c.startsWith(":") ? "r" : ""));
      out.append(table(cells(block[0]).map(inline), block.slice(2).map((l) => cells(l).map(inline)), align));
      i += block.length;
    } else if (/^[*-] /.test(line)) {
      const block = take(lines, i, (l) => /^[*-] /.test(l));
      out.append(h("ul", {}, block.map((l) => h("li", {}, inline(l.slice(2))))));
      i += block.length;
    } else {
      const block = take(lines, i, (l) => l.trim() && !/^(#|\||```|[*-] )/.test(l));
      out.append(h("p", {}, inline(block.join(" "))));
      i += Math.max(1, block.length);
    }
  }
  return out;
}

function take(lines, from, wanted) {
  let end = from;
  while (end < lines.length && wanted(lines[end])) end++;
  return lines.slice(from, end);
}

/** Code, bold and links within a line. Only links to other sites are links: the files beside a card are not served. */
function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*|\[[^\]]+\]\([^)]+\))/).filter(Boolean).map((part) => {
    if (part.startsWith("`") && part.length > 2) return h("code", {}, part.slice(1, -1));
    if (part.startsWith("**") && part.length > 4) return h("strong", {}, part.slice(2, -2));
    const link = part.match(/^\[([^\]]+)\]\(([^)]+)\)$/);
    if (!link) return part;
    const label = inline(link[1]);
    return /^https?:\/\//.test(link[2]) ? h("a", { href: link[2], rel: "noreferrer" }, label) : label;
  });
}
