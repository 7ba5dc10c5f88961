// Keeps the end of something that grows in view, until its reader scrolls up; a button leads back.

import { h } from "/assets/dom.js";

/** Nearer to the end than this is at the end. */
const NEAR = 24;

/**
 * `scroller`: what scrolls, null for the page; `content`: what grows in it. Gives `{ button, begin, end, rest, stop }`: a
 * button to be placed where it can be seen; `begin()` as something begins to grow, at whose end the view is then; `end()`
 * when it grows no more, so that what is unfolded later stays where it is; `rest()` when there is nothing to lead back to;
 * `stop()` ends all this.
 */
export function follow(scroller, content) {
  const box = scroller ?? document.scrollingElement;
  const source = scroller ?? window;
  const gone = new AbortController();
  const button = h("button", { type: "button", class: "jump", hidden: true, onclick: toEnd }, "Jump to end");
  let [growing, following, begun] = [false, false, false];
  let [top, height] = [0, 0];

  const left = () => box.scrollHeight - box.clientHeight - box.scrollTop;
  const note = () => ([top, height] = [box.scrollTop, box.scrollHeight]);
  const look = () => (button.hidden = following || !begun || left() <= NEAR);
  function settle() {
    if (following) box.scrollTop = box.scrollHeight;
    note();
    look();
  }
  function toEnd() {
    following = growing;
    box.scrollTop = box.scrollHeight;
    note();
    look();
  }
  source.addEventListener("scroll", () => {
    // What became shorter moves by itself; that is nobody's wish.
    if (box.scrollTop < top && box.scrollHeight >= height) following = false;
    else if (box.scrollTop > top && left() <= NEAR) following = growing;
    note();
    look();
  }, { passive: true, signal: gone.signal });
  // Before the scroll itself: text that comes in between would undo it.
  source.addEventListener("wheel", (event) => {
    if (event.deltaY < 0 && box.scrollTop > 0) following = false;
    look();
  }, { passive: true, signal: gone.signal });
  const observer = new ResizeObserver(settle);
  observer.observe(content);
  note();
  return {
    button,
    begin() {
      growing = begun = true;
      toEnd();
    },
    end() {
      settle();
      growing = following = false;
      look();
    },
    rest() {
      growing = following = begun = false;
      look();
    },
    stop() {
      // An answer that breaks off because its page was left must not move the next one.
      growing = following = begun = false;
      observer.disconnect();
      gone.abort();
    },
  };
}
