// A recording of the live stream: what /admin/v1/stream sent, saved as it came, or what `elastic-chaos report --stream`
// made of a run. Each message has the time at which it was sent as its id; what has none came when the one before did.

export function recorded(saved) {
  const messages = [];
  let at = 0;
  for (const block of saved.replaceAll("\r\n", "\n").split("\n\n").slice(0, -1)) {  // what was cut off is no message
    const found = parsed(block);
    if (!found) continue;
    const [kind, text, sent] = found;
    if (sent === undefined && kind === "begin") at = JSON.parse(text).now;
    if (sent !== undefined) at = Math.max(at, +sent);
    messages.push({ at, kind, text });
  }
  const begin = messages.findIndex((message) => message.kind === "begin");
  if (begin < 0) throw new Error("This is no recording of the live stream.");
  const kept = messages.slice(begin), first = kept.find((message) => message.kind === "patch") ?? kept[0];
  return { messages: kept, from: first.at, to: kept.at(-1).at };  // before its first patch there is nothing to show
}

// One server-sent event as [kind, JSON, time or undefined]. A dot would not match every line separator.
export function parsed(block) {
  const found = /^event: (\w+)\ndata: ([^\n]*)(?:\nid: ([\d.]+))?\n?$/.exec(block);
  return found && [found[1], found[2], found[3]];
}

// Goes through a recording. `begin` forgets all, `take` gets each message; times only rise between two `begin`s.
export class Player {
  constructor(recording, begin, take) { Object.assign(this, { ...recording, begin, take, at: -Infinity, next: 0 }); }
  seek(to) {
    if (to < this.at) { this.begin(); this.next = 0; }
    this.at = to;
    for (; this.next < this.messages.length && this.messages[this.next].at <= to; this.next++) {
      const { kind, text } = this.messages[this.next];
      this.take(kind, JSON.parse(text));  // each time anew: patches become parts of the document
    }
  }
}
