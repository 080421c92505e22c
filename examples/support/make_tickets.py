"""Writes `data/tickets.csv`: 400 support tickets of the example company, of which 14 break the contract.

Belongs here: the sentences people write to a support desk, by hand, and a seeded shuffle that spreads them
over customers and days. Does not belong here: what the columns promise (contracts/tickets.odcs.yaml).
People, telephone numbers and domains are invented; the numbers come from ranges reserved for fiction.

    python examples/support/make_tickets.py            # rewrites data/tickets.csv
    python examples/support/make_tickets.py OUT_FILE   # writes somewhere else
"""

import csv
import io
import random
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = HERE / "data" / "tickets.csv"
COLUMNS = (
    *("ticket_id", "opened_at", "closed_at", "customer", "product_sku"),
    *("channel", "priority", "status", "subject", "body"),
)
ROWS = 400
# What make_tickets() breaks on purpose: defect -> number of rows.
PLANTED = {
    "duplicate ticket_id": 3,
    "unreadable opened_at": 3,
    "unknown priority": 2,
    "unknown status": 2,
    "empty subject": 1,
    "malformed ticket_id": 1,
    "one field too many": 1,
    "fields missing": 1,
}


@dataclass(frozen=True)
class Customer:
    """One fictional organisation and the person there who writes to us."""

    name: str
    person: str
    email: str
    phone: str


@dataclass(frozen=True)
class Template:
    """What one kind of ticket says. Braces are filled from the slots in `make_rows`."""

    sku: str
    priority: str
    subject: str
    body: str
    answer: str


CUSTOMERS = [
    Customer("Aldergate Pharmacy", "Nadia Okafor", "nadia@aldergate.example.com", "+44 20 7946 0112"),
    Customer(
        "Brackwater Hospital Trust", "Tom Ellery", "t.ellery@brackwater.example.org", "+44 20 7946 0157"
    ),
    Customer("Calder & Sons Fishmongers", "Ruth Calder", "ruth@calderfish.example.net", "+44 20 7946 0203"),
    Customer(
        "Dovecote Veterinary Group", "Simon Achterberg", "simon@dovecotevets.example.com", "+44 20 7946 0219"
    ),
    Customer("Elm Row Surgery", "Grace Tinubu", "practice@elmrow.example.org", "+44 20 7946 0245"),
    Customer(
        "Ferrymead Blood Service", "Helen Pryce", "helen.pryce@ferrymead.example.org", "+44 20 7946 0281"
    ),
    Customer(
        "Goldfinch Catering", "Darren Walsh", "darren@goldfinchcatering.example.com", "+44 20 7946 0296"
    ),
    Customer("Harrow Lane Cheese", "Isobel Marsh", "isobel@harrowlane.example.net", "+44 20 7946 0304"),
    Customer("Apotheke am Kanal", "Jens Petersen", "petersen@apotheke-kanal.example.com", "+49 30 23125 221"),
    Customer("Birkenhof Labor", "Anke Vogt", "a.vogt@birkenhof.example.org", "+49 30 23125 347"),
    Customer("Klinik Sonnenfeld", "Murat Demir", "demir@sonnenfeld.example.org", "+49 30 23125 468"),
    Customer(
        "Pharmacie des Quais", "Camille Roussel", "camille@pharmaciedesquais.example.com", "+33 1 99 00 24 17"
    ),
    Customer("Laboratoires Vernay", "Luc Marchetti", "l.marchetti@vernay.example.net", "+33 1 99 00 51 83"),
    Customer("Norrsken Biobank", "Elin Sandberg", "elin.sandberg@norrsken.example.org", "+46 8 465 004 12"),
    Customer("Cedar Hollow Pharmacy", "Monica Reyes", "monica@cedarhollowrx.example.com", "+1 202-555-0113"),
    Customer(
        "Potomac Fertility Center",
        "Dr. Alan Whitlock",
        "whitlock@potomacfertility.example.org",
        "+1 202-555-0126",
    ),
    Customer("Bluestem Grocers", "Kayla Jennings", "kjennings@bluestem.example.net", "+1 202-555-0139"),
    Customer(
        "Fort Tilden Immunization Clinic", "Marcus Bell", "mbell@forttilden.example.org", "+1 202-555-0154"
    ),
    Customer(
        "Riverbend Transplant Lab", "Priyanka Nair", "pnair@riverbendlab.example.org", "+1 202-555-0168"
    ),
    Customer("Wattle Creek Medical", "Bronwyn Hale", "bronwyn@wattlecreek.example.com", "+61 2 5550 4321"),
    Customer("Southern Cross Couriers", "Liam Doyle", "liam.doyle@sxcouriers.example.net", "+61 2 5550 4388"),
    Customer(
        "Kingfisher Clinical Trials",
        "Olivia Sandoval",
        "osandoval@kingfisher.example.com",
        "+44 20 7946 0333",
    ),
    Customer("Marram Seafood", "Ewan Fraser", "ewan@marramseafood.example.com", "+44 20 7946 0341"),
    Customer(
        "Thornbury School Kitchens", "Pat Connolly", "pat.connolly@thornbury.example.org", "+44 20 7946 0378"
    ),
]

TEMPLATES = [
    Template(
        *("WREN-T2", "P3", "Logger shows E07"),
        "Logger {serial} in {place} shows E07 since {day}. Does this mean we have lost readings? We were closed for {weeks} weeks and the gateway was unplugged.",
        "E07 means that the memory is full and the oldest readings are overwritten. Bring the logger near the gateway; it empties in about 70 minutes. 64,000 readings are 222 days at 5 minutes, so after {weeks} weeks nothing is lost at that interval.",
    ),
    Template(
        *("WREN-T2", "P4", "Display hardly changes in the freezer"),
        "The display of {serial} in our {freezer} updates only now and then. The one in the fridge next to it changes all the time. Is it broken?",
        "No. Below −20 °C the e-paper display refreshes every 30 minutes. The readings underneath are not delayed; please compare with the chart in Perch.",
    ),
    Template(
        *("WREN-T2", "P3", "E01 after cleaning"),
        "Since the cleaners were in on {day}, {serial} says E01. The cable looks fine to me, but the plug turns freely.",
        "The M8 plug has not clicked in. Push it until it does and tighten the ring by hand. E01 went away after that.",
    ),
    Template(
        *("WREN-T2", "P3", "Battery fell from 60 % to E11 overnight"),
        "Yesterday Perch said 60 % for {serial}, this morning E11. It sits in a freezer at −25 °C. We changed the cells only {months} months ago.",
        "Firmware before 4.2 guessed batteries in the cold by voltage alone. 4.2 estimates them under load, so the sudden drop is gone. New L91 cells, then let it update.",
    ),
    Template(
        *("WREN-T2", "P4", "Can we use rechargeable batteries?"),
        "We have {n} loggers and a drawer full of rechargeable AA cells. Our facilities manager would like to use them. Any objection?",
        "Please do not. NiMH cells deliver 1.2 V and the logger reports E11 on the first day. Only lithium L91 cells are allowed.",
    ),
    Template(
        *("WREN-T2", "P3", "Leaked alkaline cells, is it warranty?"),
        "A colleague put alkaline cells into {serial} because we had run out. They leaked. The logger is {months} months old. Is this covered?",
        "I am sorry, no. Leaked batteries are the failure that the warranty names as excluded, whatever the brand. We offered a replacement with 10 % off.",
    ),
    Template(
        *("WREN-T2", "P3", "E14 on three loggers at once"),
        "Three loggers went to E14 after we changed batteries. I did take my time, the phone rang in between. Are the times wrong now?",
        "The clock runs on a capacitor for 2 minutes. After the next contact, within 15 minutes, E14 disappears and Perch corrects and flags the readings in between.",
    ),
    Template(
        *("WREN-T2", "P4", "What does one press of the button do?"),
        "My predecessor pressed the button on every logger each morning. Nobody knows why. Must I go on with it?",
        "One short press records an inspection: proof that somebody looked. Whether you need it depends on your own rules; the charts do not.",
    ),
    Template(
        *("WREN-T2", "P3", "Reset by accident"),
        "A volunteer held the button on {serial} until something happened. Now it is gone from Perch. Are the readings of {place} gone as well?",
        "Holding for 10 seconds resets the settings. Readings are kept; limits and pairing are not. Pair it again and set the limits, the history is still there.",
    ),
    Template(
        *("WREN-T2", "P2", "{n} loggers silent since the refit"),
        "Since the new steel shelving went in on {day}, {n} loggers drop out for hours at a time with E21. The gateway is green. Nothing was moved but the shelves.",
        "Steel costs about 20 dB a wall. Signals were below −100 dBm. We turned the aerial edges to the doors and added a second gateway; all are above −88 dBm now.",
    ),
    Template(
        *("WREN-T2", "P3", "Calibration overdue, may we go on using it?"),
        "E31 came up on {serial} on {day}. Inspection is in {weeks} weeks. Does the logger still alarm?",
        "Yes: measuring and alarming go on. Book the exchange service so that the fridge is never without a logger; the calibrated one leaves us first.",
    ),
    Template(
        *("WREN-T2", "P4", "How many loggers for a walk-in room of {volume} m³?"),
        "We are fitting a walk-in room of {volume} m³ and would like to know how many Wren T2 to order.",
        "Map it first: nine points up to 20 m³, fifteen above. Then two loggers stay, at the warmest and the coldest point. We lend the mapping kit for £140 a week.",
    ),
    Template(
        *("WREN-T2", "P4", "Number 61 on the display"),
        "{serial} shows 61 and nothing else. I cannot find 61 in the list of codes.",
        "Numbers from 50 to 79 are internal faults. Batteries out for a minute did not help, so we exchanged it under warranty.",
    ),
    Template(
        *("WREN-TH", "P3", "Humidity stuck at 100 %"),
        "The TH in the {room} has read 100 % since {day}. There was condensation on the ceiling. Temperature looks right.",
        "The sensor is wet. It dries by itself in one to six hours at room temperature. Please do not use a heat gun.",
    ),
    Template(
        *("WREN-TH", "P3", "Two TH side by side differ by 6 %"),
        "We hung {serial} beside a new one and they differ by 6 % RH. The old one hangs near the hand rub dispenser. Which is right?",
        "Probably the new one. Vapour of hand rub makes the sensor read 3 to 8 % too high. Bake it 12 hours at 50 °C, wait 24 hours, and move it at least 50 cm away.",
    ),
    Template(
        *("WREN-TH", "P4", "Dew point"),
        "Can Perch show the dew point for the {room}? Our cheese inspector asked for it.",
        "Yes. Settings of the logger, Add derived channel, dew point. It can carry its own limits.",
    ),
    Template(
        *("WREN-TH", "P4", "Wren TH in a freezer?"),
        "May I put a Wren TH into the freezer at −30 °C? We are only interested in the temperature there.",
        "No, the TH goes down to −20 °C. Use a Wren T2 for freezers.",
    ),
    Template(
        *("WREN-TH", "P3", "Humidity alarms every time the door opens"),
        "Our {room} alarms {n} times a day whenever somebody goes in. The delay is set to 5 minutes, I think by the previous manager.",
        "The default for humidity is 60 minutes, for that very reason. After setting it back there were no more alarms in a week.",
    ),
    Template(
        *("WREN-LN", "P2", "E02 on the cryo logger"),
        "Dewar {n}: the LN shows E02 and no temperature since {day}. The cable goes over the rim and under the lid.",
        "The cable was pinched by the lid and broke. New PROBE-PT sent. Please lead it through the notch of the neck plug and keep bends above 80 mm in the cold.",
    ),
    Template(
        *("WREN-LN", "P1", "Dewar warming 6 °C a day"),
        "Dewar {n} has warmed by 6 °C a day for two days, it is at −{cryo} °C now. Frost on the outside. What do we do?",
        "Move the samples first, then talk. More than 5 °C a day for two days with frost outside means that the vacuum is going. Rang back after 20 minutes; samples were moved.",
    ),
    Template(
        *("WREN-LN", "P3", "Always reads −196"),
        "The LN in our new vessel has read −196 °C for {weeks} weeks without the slightest change. Our technician says this is suspicious.",
        "The probe hangs in the liquid and would warn at the last centimetre only. Lift it so that the tip is 5 cm above the highest shelf, in the vapour.",
    ),
    Template(
        *("WREN-LN", "P4", "Alarm delay for vapour storage"),
        "Which limit and delay do you recommend for vapour phase storage? The default of 15 minutes seems long.",
        "−150 °C as the high limit with a delay of 5 minutes.",
    ),
    Template(
        *("WREN-LN", "P4", "Calibration at −196"),
        "Can your laboratory calibrate the LN at liquid nitrogen temperature, and what does it cost?",
        "Yes: −196, −80 and +20 °C for £95.",
    ),
    Template(
        *("WREN-GO", "P3", "Stopped by the receiver"),
        "The pharmacist in {town} pressed the button for a long time on arrival and then again. The trip in the report ends in the hall. Can you restart it?",
        "A press of 3 seconds stops the record for good. The report up to then is complete; a single short press is enough to see green or red.",
    ),
    Template(
        *("WREN-GO", "P3", "Times in the PDF are wrong"),
        "The trip report to {town} is {n} hours off. The customer refuses the delivery because of it.",
        "The PDF prints UTC and the offset chosen in setup.html. The readings are right. We wrote a note for the receiver.",
    ),
    Template(
        *("WREN-GO", "P4", "May it fly?"),
        "Our carrier asks whether the Wren GO must be switched off in the air and which UN number applies.",
        "It has no radio that transmits on its own, so it may fly running. The cell is below the limit of UN 3091 section II.",
    ),
    Template(
        *("WREN-GO", "P3", "Red although the goods were cold"),
        "Parcel {serial} arrived red. Everything was cold to the touch. The logger was taped to the ice pack.",
        "Against an ice pack it measures the ice pack, and the lower limit was crossed. Pack it beside the goods, never against a cold pack.",
    ),
    Template(
        *("WREN-GO", "P4", "How many trips are left?"),
        "We have a box of {n} GO loggers and nobody knows how often they have been used. Can this be read out?",
        "Plug one in: the first line of setup.html says how many of the 100 trips are left. Retire those below 5.",
    ),
    Template(
        *("WREN-GO", "P4", "Where do the used ones go?"),
        "Some of our GO loggers are two years old now. Do you take them back?",
        "Yes, in the free envelope. We recycle the cell and credit £6 for each.",
    ),
    Template(
        *("ROOST-4", "P1", "Whole site offline, G05"),
        "All {n} loggers at {town} are offline. The Roost shows fast amber. Our IT replaced the firewall on {day} and says that the internet works.",
        "TLS inspection. The gateway pins our certificate and refuses one that was signed again. After ingest.perch was exempted the light went green; 14 days are kept, nothing was lost.",
    ),
    Template(
        *("ROOST-4", "P3", "Slow blue light"),
        "The gateway at {town} blinks blue since {day}. Readings arrive. Should I worry?",
        "Blue means LTE-M: Ethernet is down. It was the port of the switch. LTE-M is a reserve and costs nothing extra, but please do not stay on it for weeks.",
    ),
    Template(
        *("ROOST-4", "P2", "G12 and no readings"),
        "G12 on the Roost since the network people closed everything but 443. Nothing reaches Perch. Have we lost data?",
        "UDP 123 is blocked, so the gateway does not trust its clock and holds readings back. Nothing is lost. They entered their own NTP server and it caught up in an hour.",
    ),
    Template(
        *("ROOST-4", "P2", "G09"),
        "New gateway at {town}, no Ethernet there yet, LTE-M only. Perch says G09.",
        "The network rejected the SIM. We woke it from our side; it took an hour.",
    ),
    Template(
        *("ROOST-4", "P4", "Which ports?"),
        "Our security team wants a list of ports, addresses and directions for the Roost before {day}.",
        "Outgoing only: TCP 8883 and 443, UDP 123, DNS. Names instead of addresses, because addresses change. The page Network requirements was sent.",
    ),
    Template(
        *("ROOST-4", "P3", "Proxy password longer than 32 characters"),
        "Our proxy wants a password of 40 characters and the Roost cuts it off. What now?",
        "Firmware 3.8.0 takes longer ones. The update was brought forward for this gateway.",
    ),
    Template(
        *("ROOST-4", "P4", "Two gateways hear the same logger"),
        "We have two Roost 4 on one floor. Are readings counted twice, and do we pay twice?",
        "Neither. Two gateways that both hear a logger are a good thing; readings are counted once.",
    ),
    Template(
        *("ROOST-4", "P3", "Mains lost alarm every night"),
        "At 01:30 every night we get 'mains lost' from {town}, and it ends at 05:00. Nobody is there at that time.",
        "The socket hangs on the timer of the heating. The gateway ran from its battery, which lasts 8 hours. Moved to another socket.",
    ),
    Template(
        *("ROOST-4", "P2", "Red light"),
        "The Roost at {town} is solid red. I pulled the plug, it is red again at once.",
        "Hardware fault. Within 24 months of warranty, replacement sent the same day. Loggers keep their readings meanwhile.",
    ),
    Template(
        *("ROOST-MINI", "P2", "Nothing since we got a new router"),
        "New router on {day}, and since Monday there is nothing from our fridges. The Mini is amber.",
        "Give the new router the old name and password, or hold the button for 5 seconds and set up Wi-Fi again. Loggers stay paired. The last 3 days came from the Mini, the rest from the loggers.",
    ),
    Template(
        *("ROOST-MINI", "P3", "Ninth logger will not pair"),
        "I bought a ninth logger. It says E22. The other eight work.",
        "A Roost Mini takes 8 loggers. Either a second Mini or a Roost 4; within 12 months we take the Mini back for £60.",
    ),
    Template(
        *("ROOST-MINI", "P3", "Cannot join the hospital Wi-Fi"),
        "The Mini does not join our Wi-Fi. IT says it is WPA2 enterprise with certificates, and there is a guest network with a login page.",
        "It can do neither: personal WPA2 or WPA3 on 2.4 GHz only. In a hospital the Roost 4 on Ethernet is the right one. Exchanged within 30 days.",
    ),
    Template(
        *("ROOST-MINI", "P3", "Amber after changing the band"),
        "We switched the Wi-Fi to 5 GHz only and the Mini has been amber since.",
        "It does not see 5 GHz at all. With the 2.4 GHz band on again it was green within a minute.",
    ),
    Template(
        *("ROOST-MINI", "P4", "Power from the television"),
        "Can I power the Mini from the USB port of the television in the waiting room? It restarts several times a day.",
        "That port is too weak. Please use the supply from the box.",
    ),
    Template(
        *("ROOST-MINI", "P3", "Power cut noticed too late"),
        "On {day} the power was out for 50 minutes and nobody was told. I thought an alarm would come.",
        "A Mini has no battery, so only 'no data' can warn, after 60 minutes. A Roost 4 warns after 2 minutes. Or put Mini and router on a small uninterruptible supply, 15 W are enough.",
    ),
    Template(
        *("PROBE-GLY", "P3", "Alarms at every delivery"),
        "Our vaccine fridge alarms on each delivery day, about {n} openings in an hour. The stock itself is fine.",
        "The bare sensor follows the air in 40 seconds. With the glycol bottle it takes 8 minutes, like the vials. No alarm since.",
    ),
    Template(
        *("PROBE-GLY", "P4", "Bottle half empty"),
        "The glycol bottle in {place} is half empty. Does that matter? It is {months} months old.",
        "Yes: half empty it responds in 3 minutes and alarms like a bare sensor. Refill once a year.",
    ),
    Template(
        *("PROBE-PT", "P4", "Spare probes and certificates"),
        "If I swap the PT100 on {serial} for a spare one, is the certificate of the logger still valid?",
        "No. It is for logger and probe together. A swapped pair needs a calibration of its own.",
    ),
    Template(
        *("PERCH-STD", "P2", "No SMS for one nurse"),
        "{person2} gets no SMS, all others do. Her number is {phone2}. E-mails arrive. Level 2 has her on the list.",
        "The account had used its 200 SMS of the month. Overage is now allowed, at £0.06 each, and the freezer that used them up has the defrost filter on.",
    ),
    Template(
        *("PERCH-STD", "P3", "SMS used up by the 9th"),
        "We are at 100 % of SMS on the 9th of the month. We have one freezer that alarms {n} times a day. Please top up.",
        "Topped up once. The freezer defrosts itself: the filter per logger waits up to 45 minutes. Probe into glycol as well.",
    ),
    Template(
        *("PERCH-STD", "P3", "Nobody was called at night"),
        "On {day} at 02:10 {place} went to 11 °C. Push and mails were sent, but no call, although level 3 is set. {person2} ({email2}) is the only one on it.",
        "An answering machine took the call and cannot press 1. With a single person on level 3 there was nobody to go on to. Two more people were added; please press Send test alarm.",
    ),
    Template(
        *("PERCH-STD", "P4", "Can I mute for a weekend?"),
        "We clean the cold room from Friday to Sunday. Muting ends after 4 hours. Can it be longer?",
        "No, on purpose. Plan maintenance windows, 12 hours each, at least 10 minutes ahead.",
    ),
    Template(
        *("PERCH-STD", "P3", "Excel turns 5.1 into a date"),
        "I export to CSV and Excel makes 5 January out of 5.1. I have done {n} files by hand now.",
        "Choose 'CSV for Excel', which writes semicolons and commas, or import through Data, From text.",
    ),
    Template(
        *("PERCH-STD", "P4", "Report in Fahrenheit"),
        "Our board reads Fahrenheit. Can the monthly report be sent that way?",
        "Yes, each person chooses the unit for charts and PDFs. Exports and the API stay in Celsius.",
    ),
    Template(
        *("PERCH-STD", "P3", "Export of two years ends early"),
        "I need two years of {place} for the inspector, and the CSV stops after 13 months.",
        "One file holds 13 months. For longer spans Perch makes a ZIP archive with several files; sent to the address on file.",
    ),
    Template(
        *("PERCH-STD", "P3", "Invitation never arrived"),
        "I invited {person2} ({email2}) {n} days ago. Nothing in the mailbox, nothing in junk.",
        "It was in the hospital's quarantine. IT allowed noreply@perch.hollowmere.example.com; invitation sent again, it is valid for 7 days.",
    ),
    Template(
        *("PERCH-STD", "P3", "Our only Owner has left"),
        "{person2} was the Owner and has left the company. Nobody can see invoices now. How do we get in?",
        "With a letter on headed paper, about a week. Please have two Owners from now on.",
    ),
    Template(
        *("PERCH-STD", "P4", "Invoice address and VAT"),
        "Invoice {invoice} has our old VAT number. Can you change it? Our accountant is {person2}, {email2}, {phone2}.",
        "An invoice that exists cannot be changed. We credited it and wrote a new one with the number that is in Perch now.",
    ),
    Template(
        *("PERCH-STD", "P3", "Reminder although we paid"),
        "We got a second reminder for {invoice}. It was paid on {day} from IBAN GB82 WEST 1234 5698 7654 32, reference missing I am afraid.",
        "Found without its reference and booked. The reminder is withdrawn. Alarms would not have been affected in any case.",
    ),
    Template(
        *("PERCH-STD", "P3", "Card declined"),
        "Your form declines my card 4111 1111 1111 1111 for {invoice}. Please try it again from your side, expiry 04/29.",
        "We must not take card numbers by mail and have removed it from our mailbox. This is the test number of the sandbox; please pay in Perch with a real one.",
    ),
    Template(
        *("PERCH-STD", "P4", "Charged for loggers in a drawer"),
        "{n} of our loggers were in a drawer all of last month without batteries. Are we billed for them?",
        "No. A logger that sent nothing for a whole calendar month is not billed for it.",
    ),
    Template(
        *("PERCH-STD", "P3", "429 from the API"),
        "Our script gets 429 after a while. It asks for {n} loggers, one after the other, every minute.",
        "120 requests a minute for each token. Loggers send every 15 minutes, so polling more often than every 5 shows nothing new. Please honour Retry-After.",
    ),
    Template(
        *("PERCH-STD", "P3", "Gaps in our copy of the readings"),
        "We copy readings through the API with ?since=. After the outage on {day} {n} hours are missing in our copy, but the chart in Perch is complete.",
        "Late readings appear behind cursors that you have passed. Ask with received_since instead; backfilled ones then arrive too.",
    ),
    Template(
        *("PERCH-STD", "P2", "Webhook was disabled"),
        "We got a mail that our webhook was disabled. Our endpoint answers in about 8 seconds, and it did answer.",
        "5 seconds is the limit. Answer 200 first and do the work afterwards. Enabled again.",
    ),
    Template(
        *("PERCH-VAL", "P3", "Firmware approval runs out"),
        "We have {n} days left of the 90 to approve the firmware and no time for validation. What happens afterwards?",
        "We ring, we do not force it. A change of the second number needs the release notes read and approved, not a new validation.",
    ),
    Template(
        *("PERCH-VAL", "P4", "Auditor access"),
        "An inspector comes on {day}. Can she have a sign-in of her own? {person2}, {email2}.",
        "Yes, the role Auditor, free of charge. It reads everything, changes nothing and ends on the date that you enter.",
    ),
    Template(
        *("PERCH-VAL", "P3", "SSO locked everybody out"),
        "We switched on SAML and now nobody gets in, me included. {n} people are waiting.",
        "With single sign-on passwords stop working, except for the emergency Owner. We helped to sign in with that one and to mend the certificate.",
    ),
    Template(
        *("PERCH-VAL", "P3", "Correct a wrong reading"),
        "On {day} somebody held the probe of {serial} in the hand. 31 °C in a blood fridge looks terrible. Please delete it.",
        "Nobody can change or delete a reading, our own staff included. Annotate it; the note stands beside it in the report.",
    ),
    Template(
        *("PERCH-VAL", "P1", "All gateways of the hospital offline"),
        "Night call: all {n} gateways are offline since 23:40. Platelets and plasma affected. My mobile is {phone2}.",
        "Core switch down at the hospital. All on LTE-M after a power cycle by their engineer. Answered in 25 minutes, report followed in three days.",
    ),
    Template(
        *("PERCH-VAL", "P4", "From Standard to Validated"),
        "If we change to Validated, how long are our old readings kept, and do we need a minimum number of loggers?",
        "Everything that still exists is kept 15 years from its own date. Ten loggers at least, £9.00 each a month.",
    ),
    Template(
        *("CAL-3P", "P4", "Booking for {n} loggers"),
        "Please book calibration for {n} Wren T2 in {month}, exchange service, delivery to {town}.",
        "Booked: £38 each and £12 for the exchange. Calibrated ones leave first; please return the old ones within 14 days.",
    ),
    Template(
        *("CAL-3P", "P3", "Certificate says 0.4 °C off"),
        "The certificate of {serial} says +0.4 °C as found. What about the vaccine we have stored since last year?",
        "Above 0.3 °C the certificate comes with a letter that says by how much and since when. What it means for the stock is for your pharmacist to decide.",
    ),
    Template(
        *("CAL-3P", "P4", "Is the ice bath test enough?"),
        "We check all probes in ice water every quarter. Can we leave out the calibration then?",
        "No. An ice bath finds a probe that was closed in a door, but it is a single point and not traceable.",
    ),
    Template(
        *("MOUNT-MAG", "P4", "Bracket falls off"),
        "The magnetic bracket slides down the door of {place}. The door is stainless steel.",
        "Many stainless steels are not magnetic. Use the two screw holes; we credited the bracket.",
    ),
    Template(
        *("MOUNT-MAG", "P4", "More brackets"),
        "{n} more magnetic brackets to {town}, please, on our account.",
        "Sent, £6 each.",
    ),
]

_GREETINGS = ["Hello,", "Good morning,", "Hi there,", "Dear support team,", "Hi Priya,", "", ""]
_CLOSINGS = [
    "Many thanks, {person}",
    "Best, {person}, {customer}",
    "Please ring me on {phone}. {person}",
    "Answer to {email} please, I am not at the desk. {person}",
    "Regards\n{person}\n{customer}\n{phone}",
    "Thanks!",
    "",
]
_PLACES = [
    "vaccine fridge 1",
    "vaccine fridge 2",
    "the ward fridge",
    "the insulin fridge",
    "the blood bank fridge",
]
_PLACES += ["the milk fridge", "the walk-in room", "the fish counter", "the trial drug fridge"]
_FREEZERS = ["plasma freezer", "chest freezer", "ice cream freezer", "sample freezer"]
_ROOMS = ["cheese room", "dry store", "dispensary", "archive", "packing room"]
_TOWNS = [
    "Leeds",
    "Bristol",
    "Norwich",
    "Leipzig",
    "Nantes",
    "Uppsala",
    "Richmond",
    "Baltimore",
    "Newcastle",
    "Cork",
]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def make_rows(seed: int = 20261014) -> list[dict[str, str]]:
    """The 400 tickets in the order of the file, before anything is broken."""
    rng = random.Random(seed)
    first = datetime(2026, 4, 1, tzinfo=UTC)
    order: list[Template] = []
    while len(order) < ROWS:
        order += rng.sample(TEMPLATES, len(TEMPLATES))
    opened = sorted(
        first + timedelta(days=rng.randrange(196), minutes=rng.randrange(6 * 60, 20 * 60))
        for _ in range(ROWS)
    )
    rows = []
    for number, (template, when) in enumerate(zip(order, opened, strict=False), start=1):
        customer, other = rng.sample(CUSTOMERS, 2)
        slots = {
            "serial": f"HW22{rng.randrange(10000, 99999)}",
            "place": rng.choice(_PLACES),
            "freezer": rng.choice(_FREEZERS),
            "room": rng.choice(_ROOMS),
            "town": rng.choice(_TOWNS),
            "day": rng.choice(_DAYS),
            "month": rng.choice(["June", "September", "November", "January"]),
            "weeks": str(rng.randrange(2, 7)),
            "months": str(rng.randrange(5, 22)),
            "volume": str(rng.choice([12, 16, 18, 24, 30, 45])),
            "cryo": str(rng.randrange(151, 172)),
            "n": str(rng.randrange(4, 24)),
            "invoice": f"HM-2026-{rng.randrange(1000, 9999)}",
            "person": customer.person,
            "customer": customer.name,
            "email": customer.email,
            "phone": customer.phone,
            "person2": other.person,
            "email2": other.email.split("@")[0] + "@" + customer.email.split("@")[1],
            "phone2": other.phone,
        }
        age = datetime(2026, 10, 15, tzinfo=UTC) - when
        settled = "closed" if age > timedelta(days=5) else "open"
        status = settled if age > timedelta(days=12) else rng.choice([settled, "open", "waiting"])
        parts = [rng.choice(_GREETINGS), template.body, rng.choice(_CLOSINGS)]
        body = " ".join(part.format(**slots) for part in parts if part)
        closed = ""
        if status == "closed":
            closed = _stamp(when + timedelta(hours=rng.randrange(1, 96), minutes=rng.randrange(60)))
            body += "\n\nAnswer: " + template.answer.format(**slots)
        rows.append(
            {
                "ticket_id": f"T-{number:04d}",
                "opened_at": _stamp(when),
                "closed_at": closed,
                "customer": customer.name,
                "product_sku": template.sku,
                "channel": rng.choice(["email", "email", "email", "web", "web", "phone", "chat"]),
                "priority": template.priority,
                "status": status,
                "subject": template.subject.format(**slots),
                "body": body,
            }
        )
    return rows


def _stamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _break(rows: list[dict[str, str]]) -> list[list[str]]:
    """Plants the defects of PLANTED at fixed places and returns the fields to write."""
    for later, earlier in [(88, 87), (203, 151), (377, 376)]:  # sent twice, or a number typed twice
        rows[later]["ticket_id"] = rows[earlier]["ticket_id"]
    rows[42]["opened_at"] = "31/09/2026 10:15"
    rows[160]["opened_at"] = "2026-13-04T09:00:00Z"
    rows[301]["opened_at"] = "yesterday, after lunch"
    rows[57]["priority"] = "urgent!!"
    rows[222]["priority"] = "P0"
    rows[119]["status"] = "pending"
    rows[340]["status"] = "Closed (spam)"
    rows[274]["subject"] = ""
    rows[310]["ticket_id"] = "4711"
    fields = [[row[column] for column in COLUMNS] for row in rows]
    # Somebody edited the file by hand: a customer name with a comma but without quotes, and a line cut short.
    fields[133][3:4] = ["Calder", " Sons & Daughters"]
    fields[255] = fields[255][:6]
    return fields


def make_tickets(seed: int = 20261014) -> bytes:
    """The whole CSV file: a header and 400 rows, UTF-8, quoted where needed, `\\n` at line ends."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_break(make_rows(seed)))
    return out.getvalue().encode()


def main(target: Path = TARGET) -> None:
    """Writes the file."""
    target.write_bytes(make_tickets())


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
